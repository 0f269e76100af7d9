"""A trainer's state as named tensors, independent of its stages: the content of checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.checkpoint import writing as checkpoint
from spu.checkpoint.writing import CheckpointError, Elsewhere, Stored
from spu.common.raw import write
from spu.engine.base import Sample, base_record, check_base, sampled
from spu.engine.build import BuiltStages
from spu.engine.joined import Joined, whole
from spu.engine.optimizer_state import (
    Optimizers,
    OptimizerState,
    check_optimizers,
    check_saves,
    is_attached,
    optimizer_state,
    restore_optimizers,
)
from spu.model.spaces import dotted
from spu.optim.adamw import AdamW, MasterOptimizer

__all__ = [
    "Carried",
    "TrainingState",
    "exact_parameters",
    "frozen_parameters",
    "give_value",
    "load_training",
    "model_state",
    "state_for_model",
    "training_state",
]

_FORMAT = "spu-trainer"


def _named(
    built: BuiltStages, optimizers: Optimizers
) -> dict[str, tuple[nn.Parameter, AdamW | MasterOptimizer | None]]:
    """Return every parameter by each of its names, with its optimizer; for an alias its owner.

    Of some of the stages, the parameters are those whose first stage is among them, by their names in others too.
    """
    owner = {id(p): (use.owner, use.owner_stage) for use in built.tied for p in (use.alias, use.owner)}
    own = {stage.index for stage in built.stages}
    found = {}
    for stage in (*built.stages, *built.others):
        for layer in stage.parts:
            for name, parameter in layer.named_parameters():
                parameter, index = owner.get(id(parameter), (parameter, stage.index))
                if index in own:
                    found[name] = (parameter, optimizers[index])
    return found


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds of some stages, or of all.

    Attributes:
        tensors: by name: "model:", "optimizer:" and "extra:" before the names in the model.
        frozen: what is kept of parameters that a checkpoint of adapters leaves out, by name.
        optimizer: what is no tensor of the optimizers' state, for stages in order.
        extra: the modules' own states, as JSON.
    """

    tensors: Mapping[str, torch.Tensor | Elsewhere]
    frozen: Mapping[str, Sample]
    optimizer: dict[str, Any]
    extra: dict[str, Any]

    def save(self, path: str | Path, meta: dict[str, Any]) -> None:
        """Write a checkpoint of a whole training run, ``meta`` with it.

        Raises:
            CheckpointError: writing failed.
        """
        if self.frozen:
            meta = {**meta, "base": base_record(self.frozen)}
        whole = {"format": _FORMAT, "optimizer": self.optimizer, "extra_state": self.extra, **meta}
        checkpoint.save(path, tensors=self.tensors, meta=whole)


def training_state(built: BuiltStages, optimizers: Optimizers, *, frozen: bool) -> TrainingState:
    """Return the present state of stages; nothing is copied.

    Args:
        built: all stages, or some of a model's.
        optimizers: of all.
        frozen: with parameters that are never trained; otherwise a model with the same ones can load it.

    Raises:
        CheckpointError: the optimizer's state cannot be saved; the message names it.
    """
    resting = {} if frozen else frozen_parameters(built)
    state = model_state(built, optimizers)
    tensors = {f"model:{name}": tensor for name, tensor in state.items() if name not in resting}
    check_saves(optimizers)
    own, rest = optimizer_state(built, optimizers).split()
    tensors |= {f"optimizer:{name}": tensor for name, tensor in own.items()}
    aside: dict[str, torch.Tensor] = {}
    extra = {name: _packed(module.get_extra_state(), name, aside) for name, module in _extra_states(built).items()}
    tensors |= {f"extra:{name}": tensor for name, tensor in aside.items()}
    return TrainingState(tensors, sampled(resting), rest, extra)


def load_training(
    path: str | Path,
    built: BuiltStages,
    optimizers: Optimizers,
    begin: Callable[[], None] = lambda: None,
    *,
    resting: Mapping[str, Sample] | None = None,
    own: Collection[int] | None = None,
    opened: Callable[[], AbstractContextManager[tuple[dict[str, Stored], dict[str, Any]]]] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of a `TrainingState` into a model cut into any number of stages, and return its meta.

    Args:
        begin: called after all checks, before the first value is changed: a failure after it (of the disk) leaves
            some old values.
        resting: what is kept of all frozen parameters, where some are in other processes.
        own: indices of the stages that are loaded, and read; None: all.
        opened: opens the checkpoint; None: from the disk.

    Raises:
        CheckpointError: missing, damaged, or of another model or optimizer.
    """
    with contextlib.ExitStack() as stack:
        # One tensor at a time: a second copy of all may not fit.
        tensors, meta = stack.enter_context(checkpoint.opened(path) if opened is None else opened())
        if meta.get("format") != _FORMAT:
            raise CheckpointError(f"{path} was not saved by ModelParallelTrainer.save; choose one that was")
        state = OptimizerState.joined(_with_prefix(tensors, "optimizer:"), meta.get("optimizer"))
        check_optimizers(built, optimizers, state)
        keepers, extra = _extra_states(built), meta.get("extra_state", {})
        foreign = sorted(extra.keys() - keepers.keys())
        if foreign:
            raise CheckpointError(f"the checkpoint is of another model: it has {_some(foreign)} in excess")
        model = _with_prefix(tensors, "model:")
        if not meta.get("base"):
            resting = {}
        elif resting is None:
            resting = sampled(frozen_parameters(built))
        check_base(meta.get("base"), resting)
        current = model_state(built, optimizers)
        _check_model({name: tensor for name, tensor in current.items() if name not in resting}, model)
        here = built if own is None else built.only(own)
        begin()
        _restore_model(here, optimizers, model)
        restore_optimizers(built, optimizers, state)
        for name, module in _extra_states(here).items():
            if name in extra:
                module.set_extra_state(_unpacked(extra[name], _Read(_with_prefix(tensors, "extra:"))))
    return meta


class _Read(Mapping[str, torch.Tensor]):
    """Stored tensors, each read when it is asked for."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class Carried:
    """The state of a training, kept while its stages are rebuilt; the old stages may be closed meanwhile."""

    def __init__(self, built: BuiltStages, optimizers: Optimizers) -> None:
        self._model = {name: whole(value) for name, value in model_state(built, optimizers).items()}
        self._optimizer = optimizer_state(built, optimizers)
        self._attached = any(map(is_attached, optimizers))
        self._resting = [p for owned in built.owned for p in owned.values() if not p.requires_grad]
        self._masters = {
            id(parameter): self._model[name]
            for name, (parameter, _) in _named(built, optimizers).items()
            if parameter.dtype.itemsize == 2
        }

    @property
    def differs_by_stage(self) -> bool:
        """Whether the optimizers hold values for the same stages only, or schedulers and hooks refer to them."""
        return self._optimizer.differs_by_stage or self._attached

    @contextlib.contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Unfreeze, while new stages are built, the parameters frozen since the old ones: they keep their moments."""
        for parameter in self._resting:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._resting:
                parameter.requires_grad_(False)

    def give_masters(self, built: BuiltStages) -> None:
        """Hand over the fp32 values of 16-bit parameters; call it before the optimizers are made."""
        built.masters.update(self._masters)

    def put_back(self, built: BuiltStages, optimizers: Optimizers) -> None:
        """Restore the state in the new stages and their optimizers."""
        _restore_model(built, optimizers, self._model)
        restore_optimizers(built, optimizers, self._optimizer)


def model_state(built: BuiltStages, optimizers: Optimizers) -> dict[str, torch.Tensor | Joined]:
    """Return parameters in full precision (the fp32 master if there is one) and persistent buffers, by model name.

    A master that is kept as a correction is made when it is read.
    """
    state: dict[str, torch.Tensor | Joined] = {}
    for name, (parameter, optimizer) in _named(built, optimizers).items():
        state[name] = _master(parameter, optimizer)
    for stage in built.stages:
        for layer in stage.parts:
            state.update((name, buffer.detach()) for name, buffer in layer.named_buffers())
    return state


def exact_parameters(built: BuiltStages, optimizers: Optimizers) -> dict[int, torch.Tensor | Joined]:
    """Return every parameter in full precision (the fp32 master if there is one), by its id, as `model_state`."""
    return {id(p): _master(p, optimizer) for p, optimizer in _named(built, optimizers).values()}


def state_for_model(
    model: nn.Module, built: BuiltStages, optimizers: Optimizers, away: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Return the model's own state_dict on the CPU, with hooks and extra state, and parameters in full precision.

    Args:
        away: values from other processes, by name; they are not copied.
    """
    exact: dict[int, torch.Tensor | Joined] = exact_parameters(built, optimizers)
    theirs = set[int]()
    if away:
        layers = [layer for stage in built.stages for layer in stage.parts]
        named = (pair for layer in layers for pair in (*layer.named_parameters(), *layer.named_buffers()))
        found = {id(tensor): away[name] for name, tensor in named if name in away}
        exact.update(found)
        theirs = set(found)
    state: dict[str, Any] = {}
    copies: dict[int, torch.Tensor] = {}  # ties stay ties
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            if id(value) not in copies:
                own = whole(exact.get(id(value), value)).detach()
                # Also of one that was joined just now: the copy may be in a file (`spu.memory.spill`).
                copies[id(value)] = own if id(value) in theirs else own.to("cpu", copy=True)
            state[name] = copies[id(value)]
        else:
            state[name] = deepcopy(value)
    return state


def frozen_parameters(built: BuiltStages) -> dict[str, torch.Tensor]:
    """Return the parameters that no optimizer has, by each of their names."""
    trained = {id(p) for owned in (*built.owned, built.away) for p in owned.values()}
    trained |= {id(use.alias) for use in built.tied}
    named = (pair for stage in built.stages for layer in stage.parts for pair in layer.named_parameters())
    return {name: parameter.detach() for name, parameter in named if id(parameter) not in trained}


def _extra_states(built: BuiltStages) -> dict[str, nn.Module]:
    """Return the modules with a state of their own (``get_extra_state``), by its name in the model."""
    found: dict[str, nn.Module] = {}
    for stage in built.stages:
        for layer in stage.parts:
            for name, module in layer.module.named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    found[layer.name_of(dotted(name, "_extra_state"))] = module
    return found


def _packed(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON; its tensors go into ``tensors`` by name.

    Raises:
        CheckpointError: it holds another type.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _packed(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(
        f"{name} holds a {type(value).__name__}, which a checkpoint cannot hold: let get_extra_state() return tensors, "
        "numbers and texts, in dicts with text keys, lists and tuples"
    )


def _unpacked(packed: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_unpacked(item, tensors) for item in value)
    return value


def _check_model(current: Mapping[str, torch.Tensor | Elsewhere], state: Mapping[str, torch.Tensor | Stored]) -> None:
    """Raise CheckpointError for names or shapes that do not belong to this model."""
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


def _restore_model(built: BuiltStages, optimizers: Optimizers, state: Mapping[str, torch.Tensor | Stored]) -> None:
    """Restore a :func:`model_state` that `_check_model` has accepted, into any number of stages."""
    owners = _named(built, optimizers)
    with torch.no_grad():
        for name, tensor in model_state(built, optimizers).items():
            if name not in state:  # frozen, and left out
                continue
            value = state[name]
            value = value.read() if isinstance(value, Stored) else value
            parameter, optimizer = owners.get(name, (None, None))
            if parameter is not None and isinstance(optimizer, AdamW) and optimizer.keeps_master(parameter):
                optimizer.set_master(parameter, value)
                continue
            assert isinstance(tensor, torch.Tensor)  # else the optimizer keeps a correction
            write(tensor, value)
            if parameter is not None and tensor.data_ptr() != parameter.data_ptr():  # the master of another optimizer
                parameter.copy_(tensor)


@torch.no_grad()
def give_value(built: BuiltStages, optimizers: Optimizers, parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a trained parameter its value (fp32): to its master too, where our AdamW keeps one."""
    stage = next(index for index, own in enumerate(built.owned) if any(parameter is p for p in own.values()))
    optimizer = optimizers[stage]
    if isinstance(optimizer, AdamW) and optimizer.keeps_master(parameter):
        optimizer.set_master(parameter, value)
    else:
        parameter.data.copy_(value)


def _master(parameter: nn.Parameter, optimizer: AdamW | MasterOptimizer | None) -> torch.Tensor | Joined:
    """Return the fp32 master of a parameter, also of a frozen one; the parameter itself if it has none."""
    if isinstance(optimizer, AdamW) and optimizer.keeps_correction(parameter):
        return Joined(parameter, optimizer)
    return parameter.detach() if optimizer is None else optimizer.master(parameter)


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _with_prefix(tensors: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
