"""Weights that stay in their files until somebody knows which of them are wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import devices
from transformers import LlamaConfig, LlamaForCausalLM

import spu
from spu.common import file_memory
from spu.common.absent import is_absent
from spu.model import deferred
from spu.model.convert.decoder import load_decoder, save_decoder
from spu.model.deferred import bring, brought, with_any_values
from spu.model.layers import model_layers

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_decoder(LlamaForCausalLM(CONFIG), tmp_path)
    return tmp_path


def test_what_is_wanted_is_read_and_all_else_takes_no_memory(folder: Path) -> None:
    model, whole = load_decoder(folder, CONFIG, later=True), load_decoder(folder, CONFIG)
    assert model is not None
    assert whole is not None
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in model.parameters())
    before = {name: id(p) for name, p in model.named_parameters()}
    first = model_layers(model)[:2]  # the embedding and the first block
    wanted = {id(p) for layer in first for p in layer.module.parameters()}
    bring(model, wanted)
    for (name, own), wants in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert before[name] == id(own)
        assert is_absent(own) == (id(own) not in wanted)
        assert id(own) not in wanted or torch.equal(own, wants)
    assert next(name for name, p in model.named_parameters() if not is_absent(p)) == "model.embed_tokens.weight"
    bring(model)  # what was not wanted then is left
    assert is_absent(model.lm_head.weight)


def test_all_of_it_is_the_model_of_the_folder(folder: Path) -> None:
    model, whole = load_decoder(folder, CONFIG, later=True), load_decoder(folder, CONFIG)
    assert model is not None
    assert whole is not None
    bring(torch.nn.Sequential(model))  # within another module
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_file_that_is_gone_by_then_is_named(folder: Path) -> None:
    model = load_decoder(folder, CONFIG, later=True)
    assert model is not None
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        bring(model)


def test_what_is_read_in_16_bits_is_what_rounding_makes_of_it(folder: Path) -> None:
    model, whole = load_decoder(folder, CONFIG, later=True), load_decoder(folder, CONFIG)
    assert model is not None
    assert whole is not None
    dtypes = {id(p): torch.float16 for p in model.model.layers.requires_grad_(False).parameters()}
    with brought(model, dtypes) as reading:
        reading.read_trained()
        assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data = torch.full((24, 16), 7.0, dtype=torch.float16)  # where it has moved to
        reading.read_rest(lambda *_: pytest.fail("nothing that is trained is left"))
        for own, wants in zip(model.parameters(), whole.parameters(), strict=True):
            assert own.dtype == dtypes.get(id(own), torch.float32)
            assert torch.equal(own, wants.to(own.dtype))


@pytest.mark.parametrize("fails", ["while it is read", "in the block"])
def test_a_model_is_deferred_again_where_what_it_was_read_for_fails(folder: Path, fails: str) -> None:
    model, whole = load_decoder(folder, CONFIG, later=True), load_decoder(folder, CONFIG)
    assert model is not None
    assert whole is not None
    file = folder / "model.safetensors"
    model.model.requires_grad_(False)
    if fails == "while it is read":
        file.rename(folder / "away")
    with (
        pytest.raises(OSError, match="safetensors|no room"),
        brought(model, {id(model.lm_head.weight): torch.float16}) as reading,
    ):
        reading.read_trained()
        raise OSError("no room")
    assert all(is_absent(p) and p.dtype == torch.float32 for p in model.parameters())
    if fails == "while it is read":
        (folder / "away").rename(file)
    bring(model)
    assert all(torch.equal(own, wants) for own, wants in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("state", ["fp32", "exact"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("where", ["in two stages", "below, on a disk"])
def test_weights_that_are_read_last_train_as_those_of_a_whole_model(
    where: str, precision: str, tied: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the slab that they stay in, the fp32 and the 16-bit weights had been in memory once more."""
    written: list[int] = []
    monkeypatch.setattr(file_memory, "LEAST_BYTES", 1)
    pwrite = os.pwrite
    monkeypatch.setattr(file_memory.os, "pwrite", lambda *args: (written.append(args[2]), pwrite(*args))[1])
    config = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    save_decoder(LlamaForCausalLM(config), tmp_path / "base")
    settings: dict[str, Any] = {"precision": precision, "microbatches": 2, "lr": 0.01, "state": state}
    if "disk" in where:
        settings |= {"residency": "streamed", "tiers": f"disk={tmp_path / 'spill'}:1GB"}
    ids, found = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(1)), []
    for later in (False, True):
        model = load_decoder(tmp_path / "base", config, later=later)
        assert model is not None
        model.train().model.layers[0].mlp.requires_grad_(False)
        with spu.ModelParallelTrainer(model, devices(1 if "disk" in where else 2), **settings) as trainer:
            losses = [trainer.step(ids[:, :-1], ids[:, 1:]).loss for _ in range(3)]
            assert trainer.plan is not None
            assert (trainer.plan.streaming is not None) == ("disk" in where)
            found.append((losses, trainer.state_dict_for_model()))
    (losses, values), (theirs, others) = found
    assert losses == theirs
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)
    assert bool(written) == ("disk" in where)


@pytest.mark.parametrize("state", ["fp32", "exact"])
def test_memory_without_values_is_not_copied_to_a_disk(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros of the whole model were written to the file before its values: 7 billion weights waited a minute longer."""
    save_decoder(LlamaForCausalLM(CONFIG), tmp_path / "base")
    reserve, read_rest = deferred._reserve, deferred.Reading.read_rest
    found: list[torch.Tensor] = []

    def with_marks(*args: Any) -> None:
        reserve(*args)
        for parameter in args[0].state.values():
            if not is_absent(parameter):
                parameter.data.fill_(7)

    def looked_at(self: deferred.Reading, give: Any) -> None:
        for parameter in self.waiting.values():
            found.append(parameter.detach().clone())
        optimizers = [each for each in give.args[1] if each is not None]
        found.extend(o.master(p).clone() for o in optimizers for p in self.waiting.values() if o.keeps_master(p))
        read_rest(self, give)

    monkeypatch.setattr(deferred, "_reserve", with_marks)
    monkeypatch.setattr(deferred.Reading, "read_rest", looked_at)
    model = load_decoder(tmp_path / "base", CONFIG, later=True)
    assert model is not None
    model.model.layers[0].requires_grad_(False)
    ids = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(1))
    tiers = f"disk={tmp_path / 'spill'}:1GB"
    with spu.ModelParallelTrainer(
        model, devices(1), precision="fp16", residency="streamed", tiers=tiers, state=state
    ) as trainer:
        trainer.step(ids[:, :-1], ids[:, 1:])
    assert len(found) > 20
    assert not any(values.any() for values in found)


@pytest.mark.parametrize("most", [1 << 26, 100])
def test_any_values_are_others_for_each_parameter_and_take_a_bounded_memory(
    folder: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "_ANY", most)
    model = load_decoder(folder, CONFIG, later=True)
    assert model is not None
    with with_any_values(model):
        parameters = list(model.parameters())
        assert len({p.flatten()[0].item() for p in parameters}) == len(parameters)
        assert all(p.isfinite().all() and len(p.flatten().unique()) > 10 for p in parameters)
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        assert len(held) == 1
        assert sum(held.values()) <= 4 * (max(min(most, 32 * 16), 16) + 64 * len(parameters))
        assert model(torch.arange(6)[None]).logits.isfinite().all()
    assert all(map(is_absent, model.parameters()))
