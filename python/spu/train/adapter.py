"""A run that trains adapters (``--lora``): what is trained, what it leaves, and merging it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spu.common.absent import is_absent
from spu.data.tokenizer import make_tokenizer
from spu.model.lora import LoraOptions, add_adapters
from spu.model.merge import Base, base_of_files, merge_adapter, write_parts
from spu.train.model import has_weights, load_config, make_model
from spu.train.weights import may_wait
from spu.trainer.adapter import save_adapter

if TYPE_CHECKING:
    from spu.train.config import PlanOptions, TrainConfig
    from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["ADAPTER", "base_of", "keep_adapter", "lora_options", "make_trained_model", "merge_run"]

ADAPTER = "adapter"


def lora_options(config: TrainConfig | PlanOptions) -> LoraOptions | None:
    """Return the adapters that a run trains; None where it trains the model itself."""
    if config.lora is None:
        return None
    targets = tuple(part.strip() for part in (config.lora_targets or "").split(",") if part.strip())
    alpha, dropout = getattr(config, "lora_alpha", None), getattr(config, "lora_dropout", 0.0)
    return LoraOptions(config.lora, alpha, dropout, targets, config.lora_kind)


def make_trained_model(config: TrainConfig, *, later: bool = False) -> nn.Module:
    """Return the run's model in fp32 and training mode, with its adapters if it has some.

    Args:
        later: leave weights in their files, where that serves (`may_wait`), until a trainer reads those of its stages.

    Raises:
        ValueError: as ``make_model``; or a target that is no layer of the model.
    """
    options = lora_options(config)
    model = make_model(config.model, config.seed, later=later and may_wait(config)).train()
    if options is None:
        return model
    try:
        return add_adapters(model, options, config.seed)
    except ValueError as error:
        raise ValueError(f"--lora-targets {config.lora_targets}: {error}") from error


@torch.no_grad()
def keep_adapter(model: nn.Module, trainer: ModelParallelTrainer, folder: Path) -> None:
    """Write the adapter in full precision, end the trainer, and leave a model of one dtype, on the CPU, to be sampled.

    Its frozen weights stay as they were trained with: no second copy of them is made.
    """
    save_adapter(trainer, folder / ADAPTER)
    trainer.close()
    matrix = next(p for p in model.parameters() if not p.requires_grad and p.dim() > 1)
    for parameter in model.parameters():
        parameter.grad = None
        if not is_absent(parameter):
            parameter.data = parameter.data.to("cpu", matrix.dtype)


def base_of(source: str | None, seed: int) -> Base:
    """Return the base model of a run: in its folder's files, or made again from its config and seed."""
    if source is not None and has_weights(source):
        return base_of_files(source)
    model: Any = make_model(source, seed)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head:  # as transformers saves it: once
        names = [name for name, tensor in tensors.items() if tensor.data_ptr() == head.data_ptr()]
        for name in names[1:]:
            del tensors[name]
    vocabulary = load_config(source).get_text_config().vocab_size
    tokenizer = make_tokenizer(source, vocabulary, weights=False)

    def save(into: Path, changed: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(into)
        model.generation_config.save_pretrained(into)
        tokenizer.save(into)
        write_parts(into, ((name, changed(name, tensors[name])) for name in sorted(tensors)))

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Base(source or "the default model", shapes, embedding is head, save)


def merge_run(config: TrainConfig, folder: Path, out: str | Path) -> None:
    """Write a run's model with its adapter merged into it.

    Raises:
        ValueError: a run without adapters or one that has not ended; or as ``merge_adapter``; nothing was written.
    """
    if config.lora is None:
        raise ValueError(f"{folder} trained the whole model (no --lora): its model is in {folder / 'model'}")
    if not (folder / ADAPTER).exists():
        raise ValueError(f"{folder} has no {ADAPTER} yet: go on with --resume {folder.name} to its end")
    merge_adapter(base_of(config.model, config.seed), folder / ADAPTER, out)
