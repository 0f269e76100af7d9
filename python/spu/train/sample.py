"""Let a trained model go on with a text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from spu.data.tokenizer import FileTokenizer, Tokenizer

__all__ = ["SEARCHED", "TEMPERATURE", "choose_prompt", "end_tokens", "sample_text"]

TEMPERATURE = 0.7
SEARCHED = 20_000  # tokens
_PARAGRAPH = re.compile(r"\n\n([A-Z][a-z]* [a-z]+ [a-z]+ [^\n]{20,})")


def choose_prompt(ids: torch.Tensor, tokenizer: Tokenizer, tokens: int) -> torch.Tensor:
    """Return up to ``tokens`` ids that open a paragraph of prose in a text's ``ids`` [tokens], or the first ones."""
    text = tokenizer.decode(ids[:SEARCHED].tolist())
    found = _PARAGRAPH.search(text)
    if found is None:
        return ids[:tokens]
    return tokenizer.encode(found[1].encode())[:tokens]


def end_tokens(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: the model's own ones, and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {own} if isinstance(own, int) else set(own or ())
    if isinstance(tokenizer, FileTokenizer) and tokenizer.inner.eos_token_id is not None:
        ends.add(tokenizer.inner.eos_token_id)
    return sorted(ends)


def sample_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: torch.Tensor, *, tokens: int, seed: int, ends: Collection[int] = ()
) -> tuple[str, str]:
    """Return (prompt, continuation) as text; the same for the same arguments.

    Args:
        model: a causal decoder of transformers.
        prompt: token ids [prompt tokens].
        tokens: to draw, at temperature ``TEMPERATURE``, at most.
        seed: of the draws.
        ends: ids that end the text, and are not part of it.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids, past, drawn = prompt.long()[None], None, []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers call the argument otherwise, and take both
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            probabilities = torch.softmax(out.logits[0, -1].float() / TEMPERATURE, dim=-1)
            ids = torch.multinomial(probabilities, 1, generator=generator)[None]
            if int(ids) in ends:
                break
            drawn.append(int(ids))
    model.train(was_training)
    return tokenizer.decode(prompt.tolist()), tokenizer.decode(drawn)
