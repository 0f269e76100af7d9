"""A decoder read tensor by tensor is the one that transformers loads, and takes no more memory than it is large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from families import make_decoder  # noqa: E402
from hard_limit import run_limited  # noqa: E402
from numeric import assert_equal  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from spu.model.convert.decoder import load_decoder, save_decoder  # noqa: E402
from spu.train.model import load_config  # noqa: E402

# Tied and not, experts that are stored one by one, positions, older names.
FAMILIES = [("Llama", False), ("Gemma3Text", True), ("GPT2", True), ("OPT", False), ("GPTNeoX", False)]
FAMILIES += [("Mixtral", False), ("Qwen3Moe", True)]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_decoder_is_the_one_that_transformers_loads(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_decoder(family, num_hidden_layers=2, tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_decoder(tmp_path, load_config(str(tmp_path)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for kind in ("named_parameters", "named_buffers"):
        for (name, a), b in zip(getattr(ours, kind)(), dict(getattr(theirs, kind)()).values(), strict=True):
            assert_equal(a, b, name)
    assert not any(module.training for module in ours.modules())
    ids = torch.arange(12).view(2, 6)
    assert_equal(ours(ids).logits, theirs(ids).logits, "logits")
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_what_is_saved_are_the_bytes_of_save_pretrained(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_decoder(family, num_hidden_layers=2, tie_word_embeddings=tied)
    save_decoder(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    names = sorted(f.name for f in (tmp_path / "theirs").iterdir())
    assert sorted(f.name for f in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_large_models_are_saved_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spu.model.convert.decoder._FILE_BYTES", 30_000)
    model = make_decoder("Llama", num_hidden_layers=2, tie_word_embeddings=False)
    save_decoder(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert_equal(ours, theirs, name)


@pytest.mark.parametrize("sizes", [(30_000, 1 << 30), (1 << 30, 30_000)], ids=["fewer files", "more files"])
def test_a_second_save_leaves_nothing_of_the_first(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that went on with another --export-dtype, say: spu chat, or transformers, loaded the first weights."""
    for size in sizes:
        monkeypatch.setattr("spu.model.convert.decoder._FILE_BYTES", size)
        model = make_decoder("Llama", num_hidden_layers=2, tie_word_embeddings=False)
        torch.nn.init.constant_(model.lm_head.weight, size)
        save_decoder(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    read = load_decoder(tmp_path, load_config(str(tmp_path)))
    for name, parameter in model.named_parameters():
        assert_equal(loaded.get_parameter(name), parameter, name)
        assert_equal(read.get_parameter(name), parameter, name)


def test_checkpoints_of_the_base_model_and_with_old_tables_are_read(tmp_path: Path) -> None:
    """As gpt2 on the hub: no "transformer." before the names, no head, and masks that no model has any more."""
    model = make_decoder("GPT2", num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, file, {"format": "pt"})
    loaded = load_decoder(tmp_path, load_config(str(tmp_path)))
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert_equal(ours, theirs, name)


LARGE = {"model_type": "llama", "vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 4096}
LARGE |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}

LOAD = """
import gc, resource, sys
import spu
from spu.train.model import make_model

small, large, spill, allowed, too_little, spilled = sys.argv[1:4] + [int(text) for text in sys.argv[4:]]

def within(headroom):
    gc.collect()
    held = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + headroom, resource.RLIM_INFINITY))

make_model(small, 0)  # all that is imported and cached
within(allowed)
print(sum(p.numel() for p in make_model(large, 0).parameters()))
within(too_little)
try:
    make_model(large, 0)
    print("enough")
except (MemoryError, RuntimeError):
    print("too little")
within(spilled)
with spu.spilled(spill):
    print(sum(p.numel() for p in make_model(large, 0).parameters()))
"""


def test_loading_takes_the_models_bytes_and_five_percent(tmp_path: Path) -> None:
    """Half the bytes in the file (bf16), none of them beside the model's: the limit is the system's."""
    small = {**LARGE, "hidden_size": 64, "intermediate_size": 64}
    for name, config in (("small", small), ("large", LARGE)):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        state = {n: torch.full(t.shape, 0.5, dtype=torch.bfloat16) for n, t in model.state_dict().items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    count = sum(tensor.numel() for tensor in state.values())
    largest = max(tensor.numel() for tensor in state.values())
    limits = [int(4 * (count + largest) * 1.05), 4 * (count - largest), int(4 * largest * 1.05) + (32 << 20)]
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "spill"), *map(str, limits)]
    run = run_limited(LOAD, arguments=arguments)
    assert run.code == 0, run.errors
    assert run.output.split("\n") == [str(count), "too little", str(count), ""]
