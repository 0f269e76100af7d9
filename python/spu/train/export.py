"""The end of a run: the trained model in full precision, within the memory that training needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.out_of_memory import free_memory
from spu.data.corpus import Corpus
from spu.data.tokenizer import Tokenizer
from spu.model.convert.decoder import save_decoder
from spu.train.config import TrainConfig
from spu.train.sample import SEARCHED, choose_prompt, sample_text
from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["sample_of", "save_model", "take_exact"]

SAMPLE_TOKENS, PROMPT_TOKENS = 240, 48


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
    """Return a prompt from the validation text, and the model's continuation of it."""
    prompt = corpus.question(config.seq)
    if prompt is None:
        prompt = choose_prompt(corpus.opening(SEARCHED), tokenizer, PROMPT_TOKENS)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(SAMPLE_TOKENS, (room or SAMPLE_TOKENS + PROMPT_TOKENS) - len(prompt))
    return sample_text(model, tokenizer, prompt, tokens=tokens, seed=config.seed)
