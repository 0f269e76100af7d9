"""The adapters of a model that is being trained, in the format of peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spu.engine.joined import whole
from spu.engine.state import exact_parameters
from spu.model.adapter_base import base_values
from spu.model.lora import check_adapted, write_adapter

if TYPE_CHECKING:
    from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["adapter_state", "save_adapter"]


def adapter_state(trainer: ModelParallelTrainer) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the trainer's ``PeftModel`` and its state, in which trained parameters are in full precision.

    Frozen weights are the model's own tensors, not copies; they are left out where stages are in several processes:
    then it is called in each of them, and rank 0 alone has the state.

    Raises:
        TypeError: the model has no adapters.
        RuntimeError: as ``state_dict_for_model``.
    """
    model = check_adapted(trainer._parts.as_module())
    if trainer._runner is None:
        raise RuntimeError("the trainer holds no trained state yet: call prepare() or step() first")
    runner = trainer._readable()
    if trainer._spread is not None:
        values = trainer._state_for_model(trained=True)  # by their names in the layers, which know no prefix of peft's
        layers = [layer for stage in runner.built.stages for layer in stage.parts]
        names = {id(p): name for layer in layers for name, p in layer.named_parameters()}
        own = model.state_dict(keep_vars=True)
        return model, {n: values[names[id(p)]] for n, p in own.items() if names.get(id(p)) in values}
    exact = exact_parameters(runner.built, runner.updater.optimizers)
    own = model.state_dict(keep_vars=True)
    return model, {name: whole(exact.get(id(value), value)).detach() for name, value in own.items()}


def save_adapter(trainer: ModelParallelTrainer, folder: str | Path) -> None:
    """Write the adapters that a trainer trains as ``PeftModel.save_pretrained`` does, in full precision.

    ``peft.PeftModel.from_pretrained(base, folder)`` loads them. A folder that is there is replaced when the new one is
    complete. Beside peft's files lies what the frozen weights were (`spu merge` and `spu chat` refuse others).

    Args:
        trainer: whose model is a ``PeftModel``; after :meth:`~ModelParallelTrainer.close` too.
        folder: gets adapter_config.json, adapter_model.safetensors and spu_base.json.

    Raises:
        TypeError: the model has no adapters.
        ValueError: the folder cannot be written.
        RuntimeError: as ``state_dict_for_model``.
    """
    model, state = adapter_state(trainer)
    beside = base_values(model) if trainer._spread is None else trainer._spread.beside
    if trainer._spread is None or trainer._spread.job.rank == 0:
        write_adapter(model, state, Path(folder), beside)
