"""Stages whose tensors lie below their device: what is streamed, deferred updates, and gradients on their way down."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spu import ops
from spu.common.interrupts import delayed_interrupts
from spu.engine.below import leave_empty, weights_below
from spu.engine.build import BuiltStages
from spu.engine.sharing import TiedUse
from spu.engine.waiting import Waiting, refuse_stand_ins
from spu.memory.store import Store
from spu.memory.streamed import Streamed
from spu.memory.streams import Event, Streams
from spu.memory.unit import Entry, Unit, piece
from spu.ops.optimizer import on_device
from spu.optim.adamw import AdamW, MasterOptimizer
from spu.precision import MainGrads

__all__ = ["DeferredUpdate", "Share", "Streaming", "add_tied", "streaming_units"]

_OPEN: dict[int, Store] = {}  # what is not closed: parts of a dropped trainer end in any order; it has values to give

_LARGEST_BF16 = torch.finfo(torch.bfloat16).max
_Entry = tuple[Sequence[int], torch.dtype, Callable[[Tensor], None], Callable[[], Tensor | None]]


@dataclass(frozen=True)
class DeferredUpdate:
    """An update that waits for its stage's next visit.

    Attributes:
        found_inf: fp32 [1]; the update is left out if it is not 0.
        grad_scale: fp32 [1] or None; multiplies the gradients (the clip coefficient).
        groups: the settings of the optimizer's parameter groups when the step ended, the rate with its factor.
        arrives: when the two tensors have come from a device; None: they are there.
        sources: what they are copied from, kept until then.
    """

    found_inf: Tensor
    grad_scale: Tensor | None
    groups: list[dict[str, Any]]
    arrives: Event | None = None
    sources: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Share:
    """What moves through one device.

    Attributes:
        units: by stage, those of the device, their regions allocated.
        make: makes the device's residency from the units and the work on them.
        streams: of the device, where the host updates beside it; None: updates run where the stages do.
    """

    units: dict[int, Unit]
    make: Callable[[dict[int, Unit], Streaming], Streamed]
    streams: Streams | None = None


class Streaming:
    """The work on streamed stages (`spu.memory.work.Work`): takes gradients, runs deferred updates.

    Args:
        built: the stages.
        optimizers: of every stage.
        main_grads: of every stage.
        shares: of every rank.

    Attributes:
        units: by stage, those of all ranks.
        residencies: of every rank.
    """

    def __init__(
        self,
        built: BuiltStages,
        optimizers: Sequence[AdamW | MasterOptimizer | None],
        main_grads: Sequence[MainGrads],
        shares: Sequence[Share],
    ) -> None:
        self._built, self._optimizers, self._main_grads = built, optimizers, main_grads
        units = self.units = {index: unit for share in shares for index, unit in share.units.items()}
        self._owned = {index: list(built.owned[index].values()) for index in units}
        self._tied: dict[int, list[TiedUse]] = {index: [] for index in units}
        for use in built.tied:
            if use.owner_stage in units:
                self._tied[use.owner_stage].append(use)
        self._deferred: dict[int, DeferredUpdate] = {}
        self._made: dict[int, list[bool]] = {}  # which parameters of a stage have a gradient in this step
        self._sqnorms: dict[int, Tensor] = {}
        self._streams = {index: share.streams for share in shares for index in share.units if share.streams is not None}
        # What an update needs to know, of each stage, when it has come from the device.
        scalars = partial(torch.zeros, 2, 1, dtype=torch.float32, device="cpu")
        cards = {index: built.stages[index].device.torch_device.type == "cuda" for index in self._streams}
        self._scalars = {index: scalars(pin_memory=card) for index, card in cards.items()}
        self._parking: Sequence[Store] = ()
        self._half_done: set[int] = set()
        below = {id(_parameter(e)) for unit in units.values() for each in unit.weights for e in each.entries}
        self._waiting = Waiting({k: [p for p in own if id(p) not in below] for k, own in self._owned.items()})
        modules = {id(m): m for k in units for part in built.stages[k].parts for m in part.module.modules()}
        self._guards = [module.register_state_dict_pre_hook(refuse_stand_ins) for module in modules.values()]
        self.residencies = [share.make(share.units, self) for share in shares]
        _OPEN.update((id(residency.store), residency.store) for residency in self.residencies)

    @property
    def failed(self) -> bool:
        """Whether a store has failed, so that what it held is lost."""
        return any(residency.failed for residency in self.residencies)

    @property
    def broken(self) -> str:
        """What has left weights and states half updated; "" if nothing has."""
        return f"an update of stage {min(self._half_done)} failed half-way" if self._half_done else ""

    def fill(self, stage: int) -> None:
        """Move a stage's weights and state below; see `Streamed.fill`."""
        leave_empty(self._built.empty, [_parameter(e) for each in self.units[stage].weights for e in each.entries])
        next(each for each in self.residencies if stage in each.units).fill(self.units[stage])

    def park_in(self, stores: Sequence[Store]) -> None:
        """Close the stores in which inputs of layers have waited, if they were their own; keep these instead."""
        for store in self._parking:
            store.close()
        self._parking = stores

    def close(self) -> None:
        """Close the stores and take the hooks off the model; harmless when called twice."""
        self.park_in(())
        for guard in self._guards:
            guard.remove()
        for residency in self.residencies:
            residency.close()
            _OPEN.pop(id(residency.store), None)

    def __contains__(self, stage: int) -> bool:
        return stage in self._owned

    def begin_step(self) -> None:
        """Forget the norms of the last step, and have all weights in their places."""
        self._sqnorms.clear()
        self.reveal()

    def hidden_bytes(self, stages: Collection[int]) -> int:
        """Return the bytes of these stages' weights that stay on their device and are hidden until their update."""
        return self._waiting.hidden_bytes(stages)

    def has_gradients(self) -> bool:
        """Tell whether a streamed parameter has a gradient of this step."""
        return bool(self._sqnorms)

    def sqnorm(self, stage: int) -> Tensor | None:
        """Return the squared norm (fp64 [1]) of a streamed stage's gradients; None if it has none."""
        return self._sqnorms.get(stage)

    def defer(self, stage: int, found_inf: Tensor, grad_scale: Tensor | None) -> None:
        """Note that the stage's optimizer has to step with the present settings of its groups."""
        optimizer = self._optimizers[stage]
        if optimizer is None or not any(self._made.get(stage, ())):
            return
        if found_inf.device.type == "cpu" and found_inf.item():
            return  # nothing would change: no byte has to move
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        groups = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()} for group in groups]
        streams = self._streams.get(stage)
        if streams is None:
            self._deferred[stage] = DeferredUpdate(found_inf, grad_scale, groups)
            return
        arrived, event = self._scalars[stage], None
        # On the stage's own card: from another one, the copy would not run in the stream whose event is waited for.
        device = self._built.stages[stage].device.torch_device
        sources = tuple(None if value is None else on_device(value, device) for value in (found_inf, grad_scale))
        for here, value in zip(arrived, sources):
            if value is not None:
                event = streams.copy(here, value, [streams.mark()])
        scale = None if grad_scale is None else arrived[1]
        self._deferred[stage] = DeferredUpdate(arrived[0], scale, groups, event, sources)

    def hide(self) -> None:
        """Let nobody see weights whose update waits, also where `show` was called between a step's two halves."""
        for residency in (each for each in self.residencies if any(map(self.pending, each.units))):
            residency.hide()
        self._waiting.hide(self._deferred)

    def reveal(self) -> None:
        """Put those weights back, before a run."""
        self._waiting.reveal()

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a weight was changed while its update waited or it was below; the change is dropped."""
        lost = {id(parameter) for parameter in self._waiting.changed()}
        lost |= {id(_parameter(entry)) for each in self.residencies for _, entry in each.written_over()}
        if lost:
            named = (pair for stage in self._built.stages for layer in stage.parts for pair in layer.named_parameters())
            first = next((name for name, parameter in named if id(parameter) in lost), "")
            raise RuntimeError(
                f"parameter {first!r} was changed after a step, before "
                "its update, and the change is lost: call trainer.flush() first, then change it"
            )

    def show(self, *, grads: bool = False) -> None:
        """Run what is deferred and give the model its tensors back, with the last gradients if asked.

        Ctrl-C waits: between an update and the write of its values, either would be lost.
        """
        with delayed_interrupts():
            self._waiting.reveal()
            for residency in self.residencies:
                residency.show()
                for index, unit in residency.units.items() if grads else ():
                    if unit.grads is not None:
                        views = unit.grads.views(residency.store.home(unit.grads.region))
                        for parameter, view, made in zip(self._owned[index], views, self._made.get(index, ())):
                            parameter.grad = view.float() if made else None  # itself, or a copy where it is narrower

    # spu.memory.work.Work

    def prepare(self, stage: int) -> None:
        """Bring the state of the stage's parameters into its form; where there is none, it begins with zeros."""
        optimizer = self._optimizers[stage]
        for parameter in self._owned[stage]:
            assert isinstance(optimizer, AdamW)
            if "exp_avg" in optimizer.state[parameter]:
                optimizer.prepare(parameter)
            else:  # its tensors are made where they belong: those of a whole stage may not fit beside it
                optimizer.state[parameter]["step"] = torch.zeros(1, dtype=torch.float32, device="cpu")

    def pending(self, stage: int) -> bool:
        """Tell whether an update of the stage is deferred."""
        return stage in self._deferred

    def update(self, stage: int, grads: Sequence[Tensor]) -> bool:
        """Run the stage's deferred update; its weights and state have been put."""
        deferred, optimizer = self._deferred[stage], self._optimizers[stage]
        assert isinstance(optimizer, AdamW)
        if deferred.arrives is not None:
            deferred.arrives.synchronize()
        if deferred.found_inf.item():
            del self._deferred[stage]
            return False
        parameters = self._owned[stage]
        self._half_done.add(stage)
        try:
            for parameter, grad, made in zip(parameters, grads, self._made[stage], strict=True):
                if grad.dtype != torch.float32:
                    parameter.grad_dtype = grad.dtype
                parameter.grad = grad if made else None
            with _settings(optimizer, deferred.groups):
                optimizer.step(found_inf=deferred.found_inf, grad_scale=deferred.grad_scale, bf16_grads=True)
        finally:
            for parameter, grad in zip(parameters, grads):
                parameter.grad = None
                if grad.dtype != torch.float32:
                    parameter.grad_dtype = torch.float32
        del self._deferred[stage]
        self._half_done.discard(stage)
        return True

    def lend(self, stage: int, grads: Sequence[Tensor]) -> None:
        """Let the stage's backwards write their gradients into these tensors."""
        self._main_grads[stage].lend(dict(zip(map(id, self._owned[stage]), grads, strict=True)))

    def collect(self, stage: int, grads: Sequence[Tensor]) -> None:
        """Have all gradients in the lent tensors, those of tied uses added, and take their norm."""
        for use in self._tied[stage]:
            add_tied(use)
        made, present = [], []
        for parameter, lent in zip(self._owned[stage], grads, strict=True):
            gradient, parameter.grad = parameter.grad, None
            made.append(gradient is not None)
            if gradient is not None:
                if gradient.data_ptr() != lent.data_ptr():
                    lent.copy_(gradient)
                present.append(lent)
        self._main_grads[stage].lend({})
        self._made[stage] = made
        if present:
            sqnorm = ops.grad_sqnorm(present)
            if self.units[stage].sums is not None:  # a finite gradient may round to inf
                sqnorm = sqnorm.where(sqnorm < _LARGEST_BF16**2, math.inf)
            self._sqnorms[stage] = sqnorm


@contextmanager
def _settings(optimizer: AdamW, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Give the groups of an optimizer other settings while the block runs."""
    before = [{key: group[key] for key in then} for group, then in zip(optimizer.param_groups, groups, strict=True)]
    for group, then in zip(optimizer.param_groups, groups, strict=True):
        group.update(then)
    try:
        yield
    finally:
        for group, was in zip(optimizer.param_groups, before, strict=True):
            group.update(was)


def add_tied(use: TiedUse) -> None:
    """Add the gradient of a tied use to its owner's."""
    gradient, use.alias.grad = use.alias.grad, None
    use.add(gradient)


def streaming_units(
    built: BuiltStages,
    residencies: Sequence[str],
    optimizers: Sequence[AdamW | MasterOptimizer | None],
    *,
    host_updates: bool,
    grads: torch.dtype,
) -> dict[int, Unit]:
    """Return what travels with each stage, without regions yet.

    Args:
        built: the stages.
        residencies: of each stage: "resident", "offloaded" or "streamed".
        optimizers: of each stage.
        host_updates: the host updates what lies below; offloaded weights that are trained lie there too, then.
        grads: of gradients as they wait below.

    Raises:
        ValueError: an optimizer whose tensors are not known before its first step, or a weight that stays on the device
            and would be updated by the host.
    """
    for optimizer, residency in zip(optimizers, residencies, strict=True):
        if residency != "resident" and isinstance(optimizer, MasterOptimizer):
            raise ValueError(
                f"{type(optimizer.optimizer).__name__} makes its state as it likes, which no memory tier can lay out: "
                "stream with the default optimizer (spu.optim.AdamW), or train with residency='resident'"
            )
    owner_of = {id(use.alias): id(use.owner) for use in built.tied}
    shared = set(owner_of.values())
    parameters = [stage.parameters() for stage in built.stages]
    below = weights_below(parameters, built.tied, residencies, host_updates=host_updates)
    units: dict[int, Unit] = {}
    for stage, residency in zip(built.stages, residencies, strict=True):
        if residency == "resident":
            continue
        own, optimizer = built.owned[stage.index], optimizers[stage.index]
        unit = units[stage.index] = Unit(stage.index)
        name = f"stage {stage.index}"
        if own and optimizer is not None:
            assert isinstance(optimizer, AdamW)
            unit.grads = piece(f"{name} gradients", [_gradient(p, grads) for p in own.values()])
            if grads != torch.float32:
                unit.sums = piece(f"{name} sums of gradients", [_gradient(p, torch.float32) for p in own.values()])
            unit.state = piece(f"{name} optimizer state", _state(optimizer, own.values()))
        mine = {id(p) for p in own.values()}
        frozen: list[nn.Parameter] = []
        trained: list[nn.Parameter] = []
        for parameter in below[stage.index].values():
            key = owner_of.get(id(parameter), id(parameter))
            if key in shared:
                tied = piece(f"tied weight {tuple(parameter.shape)}", [_weight(parameter)], key)
                assert tied is not None
                unit.shared += (tied,)
                unit.owned |= {key} & mine
            else:
                (trained if id(parameter) in mine else frozen).append(parameter)
        unit.frozen = piece(f"{name} frozen weights", map(_weight, frozen))
        unit.trained = piece(f"{name} weights", map(_weight, trained))
    return units


def _parameter(entry: Entry) -> nn.Parameter:
    """Return the parameter of an entry that `_weight` has made."""
    parameter: nn.Parameter = entry.get.__self__  # type: ignore[attr-defined]
    return parameter


def _weight(parameter: nn.Parameter) -> _Entry:
    return parameter.shape, parameter.dtype, partial(setattr, parameter, "data"), parameter.detach


def _gradient(parameter: nn.Parameter, dtype: torch.dtype) -> _Entry:
    """Return the entry of a gradient, which is lent and collected instead of put."""
    return parameter.shape, dtype, lambda tensor: None, lambda: torch.zeros(parameter.shape, dtype=dtype, device="cpu")


def _state(optimizer: AdamW, parameters: Iterable[nn.Parameter]) -> Iterator[_Entry]:
    """Yield the entries of the optimizer's tensors, except step numbers, which stay where they are."""

    def put(parameter: nn.Parameter, key: str, tensor: Tensor) -> None:
        optimizer.state[parameter][key] = tensor

    def get(parameter: nn.Parameter, key: str) -> Tensor | None:
        return optimizer.state[parameter].get(key)

    for parameter in parameters:
        for key, (shape, dtype) in optimizer.state_layout(parameter).items():
            yield shape, dtype, partial(put, parameter, key), partial(get, parameter, key)
