"""Sampled text depends on the model, the prompt and the seed alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from spu.data.tokenizer import ByteTokenizer
from spu.train.sample import choose_prompt, sample_text


def test_prompt_opens_a_paragraph_of_prose():
    text = b"| a | b |\n\n   code\n\nThe following table lists everything there is.\n\nMore text follows here.\n"
    ids = ByteTokenizer().encode(text)
    assert bytes(choose_prompt(ids, ByteTokenizer(), 13).tolist()) == b"The following"
    table = ByteTokenizer().encode(b"| 1 | 2 |\n" * 9)
    assert bytes(choose_prompt(table, ByteTokenizer(), 9).tolist()) == b"| 1 | 2 |"


def test_sample_is_reproducible_and_leaves_the_model_as_it_was():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    prompt = ByteTokenizer().encode(b"hello")
    state = torch.get_rng_state()
    first = sample_text(model, ByteTokenizer(), prompt, tokens=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_text(model, ByteTokenizer(), prompt, tokens=20, seed=1)
    assert first != sample_text(model, ByteTokenizer(), prompt, tokens=20, seed=2)
    assert first[0] == "hello"
    assert model.training
    end = next(character for character in first[1] if character.isascii())
    ended = sample_text(model, ByteTokenizer(), prompt, tokens=20, seed=1, ends=[ord(end)])
    assert ended[1] == first[1].split(end)[0]
