"""A trainer's state as named tensors, whatever its stages are: what checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu import checkpoint
from spu.checkpoint import CheckpointError
from spu.engine.build import Built
from spu.engine.optimizer_state import (
    Optimizers,
    OptimizerState,
    check_optimizers,
    optimizer_state,
    restore_optimizers,
)
from spu.interrupts import Held
from spu.optim import AdamW, MasterOptimizer

__all__ = ["Kept", "load_training", "model_state", "save_training"]

_FORMAT = "spu-trainer"


def _named(built: Built, optimizers: Optimizers) -> dict[str, tuple[nn.Parameter, AdamW | MasterOptimizer | None]]:
    """Every parameter by each of its names, an alias standing for its owner, with the optimizer that updates it."""
    owner = {id(use.alias): (use.owner, use.owner_stage) for use in built.tied}
    found = {}
    for stage in built.stages:
        for layer in stage.layers:
            for name, parameter in layer.named_parameters():
                parameter, index = owner.get(id(parameter), (parameter, stage.index))
                found[name] = (parameter, optimizers[index])
    return found


def save_training(path: str | Path, built: Built, optimizers: Optimizers, meta: dict[str, Any]) -> None:
    """Write a checkpoint of a whole training run, ``meta`` with it.

    Raises:
        CheckpointError: writing failed, or the optimizer keeps what cannot be saved; the message names it.
    """
    tensors = {f"model:{name}": tensor for name, tensor in model_state(built, optimizers).items()}
    own, rest = optimizer_state(built, optimizers).split()
    tensors |= {f"optimizer:{name}": tensor for name, tensor in own.items()}
    checkpoint.save(path, tensors=tensors, meta={"format": _FORMAT, "optimizer": rest, **meta})


def load_training(path: str | Path, built: Built, optimizers: Optimizers) -> dict[str, Any]:
    """Put a checkpoint of :func:`save_training` back, into a model cut into any number of stages, and return its meta.

    Raises:
        CheckpointError: missing, damaged, or of another model or optimizer; nothing was changed.
    """
    tensors, meta = checkpoint.load(path)
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not saved by ModelParallelTrainer.save; choose one that was")
    state = OptimizerState.joined(_with_prefix(tensors, "optimizer:"), meta.get("optimizer"))
    check_optimizers(built, optimizers, state)
    with Held():
        _restore_model(built, optimizers, _with_prefix(tensors, "model:"))
        restore_optimizers(built, optimizers, state)
    return meta


class Kept:
    """What training has made so far, held while the stages are built anew; the old ones may be closed meanwhile."""

    def __init__(self, built: Built, optimizers: Optimizers) -> None:
        self._model = model_state(built, optimizers)
        self._optimizer = optimizer_state(built, optimizers)
        self._masters = {
            id(parameter): _master(parameter, optimizer)
            for parameter, optimizer in _named(built, optimizers).values()
            if parameter.dtype.itemsize == 2 and parameter.requires_grad
        }

    @property
    def differs_by_stage(self) -> bool:
        """Whether the optimizers hold what only the same stages can go on with."""
        return self._optimizer.differs_by_stage

    def give_masters(self, built: Built) -> None:
        """Before the optimizers are made: the fp32 values that 16-bit parameters were rounded from."""
        built.masters.update(self._masters)

    def put_back(self, built: Built, optimizers: Optimizers) -> None:
        """Into the new stages and their optimizers."""
        _restore_model(built, optimizers, self._model)
        restore_optimizers(built, optimizers, self._optimizer)


def model_state(built: Built, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Parameters in full precision (the fp32 master where there is one) and persistent buffers, by model name."""
    state = {}
    for name, (parameter, optimizer) in _named(built, optimizers).items():
        state[name] = _master(parameter, optimizer)
    for stage in built.stages:
        for layer in stage.layers:
            state.update((name, buffer.detach()) for name, buffer in layer.named_buffers())
    return state


def _restore_model(built: Built, optimizers: Optimizers, state: Mapping[str, torch.Tensor]) -> None:
    """Put :func:`model_state` back, into a model cut into any number of stages.

    Raises:
        CheckpointError: names or shapes that do not belong to this model; nothing was changed.
    """
    current = model_state(built, optimizers)
    missing = sorted(current.keys() - state.keys())
    foreign = sorted(state.keys() - current.keys())
    if missing or foreign:
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {_some(missing)} and has {_some(foreign)} in excess; "
            "build the model that it was saved from"
        )
    for name, tensor in state.items():
        if tensor.shape != current[name].shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} has shape {tuple(tensor.shape)} there and "
                f"{tuple(current[name].shape)} here; build the model that it was saved from"
            )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(state[name])
        for parameter, optimizer in _named(built, optimizers).values():
            master = _master(parameter, optimizer)
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)
        for use in built.tied:
            if use.alias.data_ptr() != use.owner.data_ptr():
                use.alias.copy_(use.owner)


def _master(parameter: nn.Parameter, optimizer: AdamW | MasterOptimizer | None) -> torch.Tensor:
    """The fp32 value that a parameter's was rounded from; the parameter itself where there is none."""
    if optimizer is None or not parameter.requires_grad:
        return parameter.detach()
    return optimizer.master(parameter)


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
