"""InternLM2's checkpoints: the same logits and gradients as its own arithmetic, and the same bytes when written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from internlm2 import CONFIG, forward, write_checkpoint
from numeric import assert_close_to_truth, assert_equal

from spu.cost.blueprint import blueprint, config_of
from spu.model.convert.internlm2 import layout_of
from spu.model.convert.layout import write_tensor
from spu.model.layers import model_layers
from spu.train.model import load_config, make_model

OTHERS = {
    "with biases": {"bias": True},
    "no scaling": {"rope_scaling": None},
    "a key head each": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
}


def load(folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    config = CONFIG | changes
    weights = write_checkpoint(folder, config)
    return make_model(str(folder), 0), weights, config


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [({}, 7), ({}, 16), ({}, 40), *((changes, 40) for changes in OTHERS.values())],
    ids=["short", "full", "past the limit", *OTHERS],
)
def test_logits_and_gradients_are_internlm2s(tmp_path: Path, changes: dict[str, Any], tokens: int) -> None:
    model, weights, config = load(tmp_path, **changes)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(config["vocab_size"], (2, tokens + 1), generator=generator)
    ids[0, 0] = config["pad_token_id"]
    results = {}
    for dtype in (torch.float64, torch.float32):
        own = {name: tensor.to(dtype).requires_grad_() for name, tensor in weights.items()}
        logits = forward(own, ids[:, :-1], config)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        results[dtype] = logits.detach(), {name: tensor.grad for name, tensor in own.items()}
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    # Twice the bound of one op: two orders of the same fp32 sums, and rotary tables in fp32 against fp64 here.
    (true, true_gradients), (plain, plain_gradients) = results.values()
    assert_close_to_truth(logits, plain, true, factor=4.0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, stored in layout_of(model).items():
        gradient = torch.cat(list(write_tensor(stored, gradients))).view(stored.shape)
        assert_close_to_truth(gradient, plain_gradients[name], true_gradients[name], factor=4.0)


def test_an_unchanged_model_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    for shards in (1, 3):
        source, copy = tmp_path / f"source{shards}", tmp_path / f"copy{shards}"
        write_checkpoint(source, shards=shards)
        (source / "tokenizer.model").write_bytes(b"pieces")
        make_model(str(source), 0).spu_checkpoint.save(make_model(str(source), 0), copy, torch.bfloat16)
        assert sorted(f.name for f in copy.iterdir()) == sorted(f.name for f in source.iterdir())
        for file in source.iterdir():
            assert (copy / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_trained_model_is_written_in_fp32_and_read_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, _, config = load(tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.spu_checkpoint.save(model, tmp_path / "new")
    again = make_model(str(tmp_path / "new"), 0)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert_equal(theirs, ours, name)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == config | {"torch_dtype": "float32"}
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "new" / file, "pt") as opened:  # the package's own reader
            for name in opened.keys():  # noqa: SIM118
                assert opened.get_tensor(name).dtype == torch.float32


def test_plans_need_no_weights_and_no_remote_code(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    layers = blueprint(str(tmp_path))
    assert [layer.name for layer in layers] == ["embed", "layers.0", "layers.1", "head"]
    assert [layer.name for layer in model_layers(make_model(str(tmp_path), 0))] == [layer.name for layer in layers]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": 0}, "has no num_hidden_layers"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling .*yarn"),
        ({"num_key_value_heads": 3}, "4 heads with 3 key heads"),
    ],
)
def test_configs_that_are_not_internlm2s_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(CONFIG | changes, "DIR")


def test_the_published_sizes_are_known() -> None:
    published = CONFIG | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "vocab_size": 92544,
    }
    config = config_of(published, "DIR")
    assert (config.head_dim, config.pad_token_id, config.rms_norm_eps) == (128, 2, 1e-5)
    assert load_config("internlm2-1.8b").hidden_size == config.hidden_size
