"""The optimizers' state by parameter name and by stage, for checkpoints and for rebuilt stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spu.checkpoint.writing import CheckpointError, Stored
from spu.common import torch_private
from spu.engine.build import BuiltStages
from spu.optim.adamw import MASTER_KEYS, AdamW, MasterOptimizer

__all__ = [
    "OptimizerState",
    "Optimizers",
    "check_optimizers",
    "check_saves",
    "is_attached",
    "optimizer_state",
    "remember_groups",
    "restore_optimizers",
]

Optimizers = Sequence[AdamW | MasterOptimizer | None]

_OWN = ("params", "param_names", "initial_lr")
_COUNTS = ("step", "mu_product")  # of no dimension; what else has none lies beside its parameter
# What each group was made with: the trainer's argument, as the defaults are, until somebody changes it.
_MADE: WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class OptimizerState:
    """All state of a model's optimizers except master weights, which belong to the model's state.

    Attributes:
        kind: the optimizer's class, by name; "" where nothing is trained.
        entries: ``NAME/KEY`` -> a parameter's state: a tensor, or another value of the optimizer.
        groups: for each stage and parameter group, the values that were changed since it was made.
        owned: the number of parameters that each stage updates.
    """

    kind: str
    entries: dict[str, Any]
    groups: list[list[dict[str, Any]]]
    owned: list[int]

    @property
    def differs_by_stage(self) -> bool:
        """Whether groups hold values that only the same stages can use."""
        own = [groups for groups, count in zip(self.groups, self.owned) if count]
        return self.common is None and any(groups != own[0] for groups in own)

    @property
    def common(self) -> dict[str, Any] | None:
        """The values that all groups of all stages share, often none; None if one has others."""
        every = [group for groups, count in zip(self.groups, self.owned) if count for group in groups]
        first = every[0] if every else {}
        return first if all(group == first for group in every) else None

    def split(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors, and the rest as JSON.

        Raises:
            CheckpointError: neither can hold an entry; the message names it.
        """
        tensors = {name: value for name, value in self.entries.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in self.entries.items() if name not in tensors}
        for name, value in [*plain.items(), *((k, v) for own in self.groups for g in own for k, v in g.items())]:
            if not _is_plain(value):
                raise CheckpointError(
                    f"{self.kind} keeps {name} as a {type(value).__name__}, which a checkpoint cannot hold: "
                    "use an optimizer whose state is tensors, and numbers or texts"
                )
        return tensors, {"kind": self.kind, "plain": plain, "groups": self.groups, "owned": self.owned}

    @staticmethod
    def joined(tensors: Mapping[str, torch.Tensor | Stored], rest: Mapping[str, Any] | None) -> OptimizerState:
        """Join the two parts of :meth:`split`; ``rest`` is None in checkpoints that were written without it."""
        rest = rest or {"kind": "", "plain": {}, "groups": [], "owned": []}
        return OptimizerState(rest["kind"], {**tensors, **rest["plain"]}, rest["groups"], rest["owned"])


def optimizer_state(built: BuiltStages, optimizers: Optimizers) -> OptimizerState:
    """Return the present state; nothing is copied."""
    found = {
        f"{name}/{key}": value
        for owned, optimizer in zip(built.owned, optimizers)
        for name, parameter in owned.items()
        for key, value in _entries(parameter, optimizer).items()
        if key not in MASTER_KEYS
    }
    groups = [[_changed(inner, group) for group in inner.param_groups] for inner in map(_inner, optimizers) if inner]
    counts = [len(owned) for owned, optimizer in zip(built.owned, optimizers) if optimizer is not None]
    return OptimizerState(_kind(optimizers), found, groups, counts)


def check_saves(optimizers: Optimizers) -> None:
    """Raise CheckpointError for an optimizer with more to save than the state of parameters and groups."""
    for inner in filter(None, map(_inner, optimizers)):
        if aside := _aside(inner):
            raise CheckpointError(
                f"{type(inner).__name__}.state_dict() has {', '.join(aside)} beside 'state' and 'param_groups', which "
                "belongs to no parameter, and a checkpoint would lose it: keep it in the optimizer's parameter groups"
            )


def check_optimizers(built: BuiltStages, optimizers: Optimizers, state: OptimizerState) -> None:
    """Check that these optimizers can continue from a state.

    Raises:
        CheckpointError: it is of another class of optimizer, or bound to other stages.
    """
    own = optimizer_state(built, optimizers)
    if state.kind and own.kind and state.kind != own.kind:
        raise CheckpointError(f"the checkpoint's optimizer is {state.kind}, this one {own.kind}: train with the same")
    if state.differs_by_stage and state.owned != own.owned:
        keys = sorted({key for groups in state.groups for group in groups for key in group})
        raise CheckpointError(
            f"{state.kind} has its own {', '.join(keys)} in each of {len(state.owned)} stages: "
            "go on with the plan that the checkpoint was saved with"
        )
    for index, inner in enumerate(inner for inner in map(_inner, optimizers) if inner):
        saved = _saved_groups(state, index, inner)
        if len(saved) != len(inner.param_groups) and not _known(saved, inner):
            raise CheckpointError(
                f"{state.kind} has {len(saved)} parameter groups with values of their own in the checkpoint, and "
                f"{len(inner.param_groups)} in stage {index} of this plan: go on with the plan that it was saved with, "
                "or make the same groups in every stage (a group may be empty)"
            )


def restore_optimizers(built: BuiltStages, optimizers: Optimizers, state: OptimizerState) -> None:
    """Restore a state that `check_optimizers` has accepted; parameters that it does not name start without state."""
    by_name: dict[str, dict[str, Any]] = {}
    for full, value in state.entries.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    for owned, optimizer in zip(built.owned, optimizers):
        beside = _with_counts_beside(optimizer)
        for name, parameter in owned.items():
            entries = _entries(parameter, optimizer)
            for key in [key for key in entries if key not in MASTER_KEYS]:
                del entries[key]
            for key, value in by_name.get(name, {}).items():
                if isinstance(value, Stored | torch.Tensor):
                    held = value.read() if isinstance(value, Stored) else value  # what is read has memory of its own
                    counts = key in _COUNTS and id(_target(parameter, optimizer)) not in beside
                    stays = counts and not held.dim() and held.device.type == "cpu"
                    place = held.device if stays else parameter.device
                    value = held.to(place, copy=held is value)
                entries[key] = value
    inners = [inner for inner in map(_inner, optimizers) if inner]
    for index, inner in enumerate(inners):
        saved = _saved_groups(state, index, inner)
        if len(saved) == len(inner.param_groups):
            for group, made, values in zip(inner.param_groups, _made(inner), saved):
                for key, value in (made | values).items():
                    if key == "lr" and isinstance(group.get("lr"), torch.Tensor):
                        group["lr"].fill_(value)
                    else:
                        group[key] = tuple(value) if isinstance(value, list) else value  # JSON has lists


def _saved_groups(state: OptimizerState, index: int, inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return a state's values for the groups of an optimizer, the one with this index."""
    if state.common is not None:
        return [state.common for _ in inner.param_groups]
    return state.groups[index] if state.differs_by_stage else next(iter(state.groups), [])


def _known(saved: list[dict[str, Any]], inner: torch.optim.Optimizer) -> bool:
    """Tell whether every group has the values of a saved one as it was made, so that nothing is to be restored."""
    if not any(saved):
        return True
    return all(
        any(all(key in made and _same(made[key], value) for key, value in values.items()) for values in saved)
        for made in _made(inner)
    )


def remember_groups(optimizer: AdamW | MasterOptimizer) -> None:
    """Remember the values that a new optimizer's groups have: one that differs later is part of the state."""
    inner = _inner(optimizer)
    assert inner is not None
    _MADE[inner] = [_values(group) for group in inner.param_groups]


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values, which stay as they are when it changes."""
    found = {key: value for key, value in group.items() if key not in _OWN}
    if "lr" in found:
        found["lr"] = float(found["lr"])
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def _made(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what the groups were made with; of one that came later the optimizer's defaults."""
    made = _MADE.get(optimizer, [])
    later = [
        {key: value for key, value in optimizer.defaults.items() if key in group and key not in (*_OWN, "lr")}
        for group in optimizer.param_groups[len(made) :]
    ]
    return [*made[: len(optimizer.param_groups)], *later]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    try:
        return bool((list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b))
    except (RuntimeError, ValueError):  # of tensors or arrays in a list
        return False


def is_attached(optimizer: AdamW | MasterOptimizer | None) -> bool:
    """Tell whether a scheduler or a hook of the user's refers to this optimizer object, or what it keeps is its own."""
    inner = _inner(optimizer)
    if inner is None:
        return False
    return torch_private.has_step_hooks(inner) or bool(_aside(inner))


def _kind(optimizers: Optimizers) -> str:
    return next((type(inner).__name__ for inner in map(_inner, optimizers) if inner), "")


def _inner(optimizer: AdamW | MasterOptimizer | None) -> torch.optim.Optimizer | None:
    return optimizer.optimizer if isinstance(optimizer, MasterOptimizer) else optimizer


def _aside(inner: torch.optim.Optimizer) -> list[str]:
    """Return the keys of an optimizer's own ``state_dict`` that are neither parameters' state nor groups."""
    if type(inner).state_dict is AdamW.state_dict:
        return []
    return sorted(map(str, inner.state_dict().keys() - {"state", "param_groups"}))


def _changed(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's values that differ from those that it was made with: its state from step to step."""
    index = next(i for i, own in enumerate(optimizer.param_groups) if own is group)
    made = _made(optimizer)[index]
    changed = {}
    for key, value in group.items():
        if key in _OWN or (key == "lr" and key not in made):
            continue
        value = float(value) if key == "lr" else value
        if key not in made or not _same(value, made[key]):
            changed[key] = value
    return changed


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _with_counts_beside(optimizer: AdamW | MasterOptimizer | None) -> set[int]:
    """Return the ids of tensors whose counts lie on their own device: kernels read them there, or it is torch's ASGD.
    In torch's other optimizers they are the host's.
    """
    inner = _inner(optimizer)
    groups = [] if inner is None else inner.param_groups
    if not isinstance(inner, torch.optim.ASGD):
        groups = [group for group in groups if group.get("fused") or group.get("capturable")]
    return {id(p) for group in groups for p in group["params"]}


def _target(parameter: nn.Parameter, optimizer: AdamW | MasterOptimizer | None) -> torch.Tensor:
    return optimizer.target(parameter) if isinstance(optimizer, MasterOptimizer) else parameter


def _entries(parameter: nn.Parameter, optimizer: AdamW | MasterOptimizer | None) -> dict[str, Any]:
    """Return the optimizer's own state of a parameter, to read or to change."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, AdamW):
        return optimizer.state[parameter]
    return optimizer.optimizer.state[_target(parameter, optimizer)]
