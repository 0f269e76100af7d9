"""The end of a run: the trained model in full precision, within the memory that training needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.out_of_memory import free_memory
from spu.data.corpus import Corpus
from spu.data.tokenizer import Tokenizer
from spu.model.convert.decoder import save_decoder
from spu.train.config import TrainConfig
from spu.train.ranks import LeadingTrainer
from spu.train.sample import SEARCHED, choose_prompt, end_tokens, sample_text
from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["sample_of", "save_from_all", "save_model", "take_exact"]

SAMPLE_TOKENS, PROMPT_TOKENS = 240, 48
_KEPT = 4  # tensors of another process: a stored one is made of three of ours at most


@torch.no_grad()
def take_exact(model: nn.Module, trainer: ModelParallelTrainer) -> None:
    """End a trainer, and give its model's parameters their values in full precision, on the CPU.

    The gradients are freed first, to make room. Drop the trainer afterwards: it owns masters and moments.
    """
    trainer.close()
    for parameter in model.parameters():
        parameter.grad = None
    free_memory()
    exact = trainer.state_dict_for_model()
    model.to("cpu")
    for name, parameter in model.named_parameters():  # each once: what is tied stays so
        parameter.data = exact.pop(name)


class _Values(Mapping[str, torch.Tensor]):
    """Tensors by name, those of other processes read when they are asked for; the last few are kept."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor
        if name not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = tensor.read()
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def save_from_all(
    model: Any, trainer: LeadingTrainer, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype
) -> bool:
    """Save a model whose stages are in several processes as `save_model` does, one tensor at a time in memory here.

    Returns:
        False where the model's form does not allow that; nothing was written then.
    """
    written = []

    def write(tensors: dict[str, Any]) -> str:
        values = _Values(tensors)
        checkpoint = getattr(model, "spu_checkpoint", None)
        if checkpoint is not None:
            checkpoint.save(model, folder, dtype, values)
        written.append(checkpoint is not None or save_decoder(model, folder, values, dtype))
        return "done"

    trainer.with_state(write)
    if written[0]:
        tokenizer.save(folder)
    return written[0]


def save_model(model: Any, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Save the model as ``AutoModelForCausalLM.from_pretrained`` reads it, with the tokenizer beside it.

    An InternLM2 checkpoint is written as one.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        folder: where to.
        dtype: of its weights from now on; buffers keep theirs, as when transformers loads it.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    checkpoint = getattr(model, "spu_checkpoint", None)  # of another form than transformers'
    if checkpoint is not None:
        checkpoint.save(model, folder)
    else:
        save_decoder(model, folder)
    tokenizer.save(folder)


def sample_of(model: Any, tokenizer: Tokenizer, corpus: Corpus, config: TrainConfig) -> tuple[str, str]:
    """Return a prompt from the validation text, and the model's continuation of it; its answer, if it is a question."""
    prompt, ends = corpus.question(config.seq), end_tokens(model, tokenizer)
    if prompt is None:
        prompt, ends = choose_prompt(corpus.opening(SEARCHED), tokenizer, PROMPT_TOKENS), []
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(SAMPLE_TOKENS, (room or SAMPLE_TOKENS + PROMPT_TOKENS) - len(prompt))
    return sample_text(model, tokenizer, prompt, tokens=tokens, seed=config.seed, ends=ends)
