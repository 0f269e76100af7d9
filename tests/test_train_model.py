"""Models: from a config, from weights, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from spu.train.model import load_config, make_model  # noqa: E402


def test_default_model_is_a_function_of_the_seed():
    first, again, other = make_model(None, 1), make_model(None, 1), make_model(None, 2)
    assert sum(p.numel() for p in first.parameters()) >= 3_000_000
    assert first.config.num_hidden_layers >= 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_models_that_cannot_be_used_are_refused(tmp_path):
    def config_file(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, **changes}))
        return str(path)

    with pytest.raises(ValueError, match=r"no such file or folder with a config.json"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="model_type 'newthing': it needs code of its own, which is not run"):
        load_config(config_file(model_type="newthing", auto_map={"AutoModel": "evil.Model"}))
    with pytest.raises(ValueError, match="model_type 'newthing': transformers does not know it"):
        load_config(config_file(model_type="newthing"))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_config(str(tmp_path))
    config_file()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is pickled and not read; convert the weights to safetensors"
    ):
        make_model(str(tmp_path), 0)


def test_weights_come_from_safetensors_and_must_be_whole(tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model = make_model(str(tmp_path), 3)
    model.save_pretrained(tmp_path / "saved")
    loaded = make_model(str(tmp_path / "saved"), 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor 'model.norm.weight'; give the weights of the whole model"):
        make_model(str(tmp_path / "saved"), 4)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        make_model(str(tmp_path / "saved"), 4)
