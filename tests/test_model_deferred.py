"""Weights that stay in their files until somebody knows which of them are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spu.common.absent import is_absent
from spu.model.convert.decoder import load_decoder, save_decoder
from spu.model.deferred import bring, brought
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
    with brought(model, dtypes) as read:
        assert torch.equal(model.lm_head.weight, whole.lm_head.weight), "what is trained is read at once"
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data = torch.full((24, 16), 7.0, dtype=torch.float16)  # where it has moved to
        read()
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
    with pytest.raises(OSError, match="safetensors|no room"), brought(model, {id(model.lm_head.weight): torch.float16}):
        raise OSError("no room")
    assert all(is_absent(p) and p.dtype == torch.float32 for p in model.parameters())
    if fails == "while it is read":
        (folder / "away").rename(file)
    bring(model)
    assert all(torch.equal(own, wants) for own, wants in zip(model.parameters(), whole.parameters(), strict=True))
