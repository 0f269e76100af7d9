"""From a flat list of layers to stages on devices: precision, placement, and parameters that several stages use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spu import nn as spu_nn
from spu.common.absent import absent
from spu.common.dtypes import DTYPES
from spu.common.interrupts import delayed_interrupts
from spu.common.moves import move_module
from spu.devices.manager import Device
from spu.engine.below import CPU, hosted_stages, move_rest, stage_weights, weights_below
from spu.engine.loss import loss_part, move_loss
from spu.engine.sharing import TiedUse, Twin, separate, untie
from spu.engine.stage import Stage
from spu.model.aliases import overlapping
from spu.model.layers import Layer
from spu.ops.convert import same_weights
from spu.precision.dtypes import convert_state, state_dtypes

__all__ = [
    "BuiltStages",
    "build_stages",
    "check_parameters",
    "frozen_dtypes",
    "restore_masters",
    "to_precision",
    "undo_precision",
    "unfused",
]


@dataclass
class BuiltStages:
    """Stages ready to run. Between runs the model is the user's; see `spu.engine.sharing`.

    Attributes:
        stages: in pipeline order.
        owned: for each stage the trainable parameters that its optimizer updates, by name.
        tied: further uses of owned parameters, in stage order.
        twins: further uses of modules.
        fused: modules whose layers were put on fused ops for this training alone.
        away: the trainable parameters of stages in other processes, by name.
        others: stages left out by `only`.
        masters: fp32 values of 16-bit parameters from before they were rounded, by parameter id.
        empty: ids of parameters that have memory and no values yet: their files are read where they will be.
    """

    stages: list[Stage]
    owned: list[dict[str, nn.Parameter]]
    tied: list[TiedUse]
    twins: list[Twin] = field(default_factory=list)
    masters: dict[int, torch.Tensor] = field(default_factory=dict)
    empty: Collection[int] = ()
    fused: list[nn.Module] = field(default_factory=list)
    away: dict[str, nn.Parameter] = field(default_factory=dict)
    others: list[Stage] = field(default_factory=list)

    def begin(self, masters: dict[int, torch.Tensor], empty: Collection[int]) -> None:
        """Take fp32 values by parameter id, and the ids of what has no values; before the optimizers are made."""
        self.masters.update(masters)
        self.empty = empty

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Give each stage leaves and modules of its own, equal to the user's present ones, while the block runs.

        A stage's weights may be other ones in the same memory at its next visit: no conversion of them is kept.

        Raises:
            RuntimeError: a forward changed what several stages share.
        """
        try:
            for twin in self.twins:
                twin.enter()
            for use in self.tied:
                use.enter()
            with same_weights(False):
                yield
            for twin in self.twins:
                twin.check()
        finally:
            with delayed_interrupts():
                for use in self.tied:
                    use.restore()

    def only(self, own: Collection[int]) -> BuiltStages:
        """Return these with some of the stages alone."""
        stages = [stage for stage in self.stages if stage.index in own]
        return replace(self, stages=stages, others=[stage for stage in self.stages if stage.index not in own])

    def restore(self) -> None:
        """Give the model back as it was; harmless when called twice."""
        for use in self.tied:
            use.restore()
        for twin in self.twins:
            twin.restore()

    def unfuse(self) -> None:
        """Give linear layers and blocks their own classes back, except those that the user had fused before."""
        _unfuse(self.fused)


def _unfuse(modules: list[nn.Module]) -> None:
    """Give the parts of these modules their own classes back, and empty the list."""
    while modules:
        with contextlib.suppress(ValueError):  # its class has been changed since
            spu_nn.restore(modules.pop())


def frozen_dtypes(layers: Sequence[Layer], precision: str) -> dict[int, torch.dtype]:
    """Return the dtypes, by id, that `to_precision` gives parameters which are not trained: no exact value is kept
    beside them.
    """
    modules = [layer.module for layer in layers]
    frozen = {id(p) for module in modules for p in module.parameters() if not p.requires_grad}
    return {key: dtype for key, dtype in state_dtypes(modules, DTYPES[precision]).items() if key in frozen}


def to_precision(
    layers: Sequence[Layer],
    precision: str,
    masters: dict[int, torch.Tensor],
    *,
    fused: bool = False,
    away: Collection[int] = (),
    empty: Collection[int] = (),
) -> None:
    """Convert floating-point parameters in place.

    `spu.precision.dtypes` says which parameters keep fp32 or their own dtype. In a 16-bit precision, linear layers also
    become :class:`spu.nn.Linear`, whose backward knows the loss scale, and layers run their products in that precision.

    Args:
        layers: the model.
        precision: "fp16", "bf16" or "fp32".
        masters: gets, before anything is rounded, the fp32 values of trainable parameters that become 16-bit, by
            parameter id: so `undo_precision` can put them back also where a disk is full half-way.
        fused: let linear layers become :class:`spu.nn.Linear` in fp32 too: schedules that defer weight
            gradients need it, since plain autograd computes both gradients of a layer at once.
        away: ids of parameters whose values are in other processes.
        empty: ids of parameters that have memory and no values yet.
    """
    dtype = DTYPES[precision]
    modules = [layer.module for layer in layers]
    dtypes = state_dtypes(modules, dtype)
    for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
        becomes = dtypes.get(id(parameter), parameter.dtype)
        if id(parameter) in away:
            parameter.data = absent(parameter.shape, becomes)
        elif parameter.requires_grad and becomes != parameter.dtype and becomes.itemsize == 2:
            masters[id(parameter)] = parameter.detach().to(torch.float32)  # its own memory: it gets another one below
            if id(parameter) in empty:  # a conversion would write to it
                parameter.data = torch.empty(parameter.shape, dtype=becomes, device="cpu")
    convert_state(modules, dtypes)
    for layer in layers:
        layer.products = dtype if dtype.itemsize == 2 else None
        if dtype.itemsize == 2 or fused:
            spu_nn.accelerate(layer.module)


def restore_masters(layers: Sequence[Layer], masters: dict[int, torch.Tensor]) -> None:
    """Set parameters from another trainer's exact values, which that trainer's own precision had rounded."""
    for layer in layers:
        for parameter in layer.module.parameters():
            if id(parameter) in masters:
                parameter.data.copy_(masters[id(parameter)])


def unfused(layers: Sequence[Layer]) -> list[nn.Module]:
    """Return the layers' modules in which nothing runs on fused ops yet."""
    modules = [layer.module for layer in layers]
    return [module for module in modules if not any(map(spu_nn.is_accelerated, module.modules()))]


def check_parameters(layers: Sequence[Layer]) -> None:
    """Raise ValueError for parameters that are to be trained and cannot be: complex ones, and two over one memory."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.is_complex() and parameter.requires_grad:
                raise ValueError(
                    f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}, but main gradients and "
                    "optimizers here are real: hold its real and imaginary parts (torch.view_as_real), and put them "
                    "together in forward with torch.view_as_complex; or freeze it"
                )
    parameters = [pair for layer in layers for pair in layer.named_parameters()]
    named = {id(parameter): (name, parameter) for name, parameter in parameters if not is_lazy(parameter)}
    pair = overlapping([parameter for _, parameter in named.values()])
    found = [] if pair is None else [list(named.values())[index] for index in pair]
    if any(parameter.requires_grad for _, parameter in found):
        (first, _), (second, _) = found
        raise ValueError(
            f"{first!r} and {second!r} are two parameters over one memory, as load_state_dict(assign=True) makes them "
            "of a tied model: two updates would write to it, in two stages at once, and 16 bits would part them. Tie "
            "them: make one parameter of both (head.weight = embedding.weight)"
        )


def undo_precision(layers: Sequence[Layer], masters: dict[int, torch.Tensor], fused: list[nn.Module]) -> None:
    """Give rounded parameters their fp32 values back, and layers their own classes, if training never began.

    Args:
        layers: the model.
        masters: from `to_precision`, also one that failed.
        fused: what `unfused` returned before it; emptied.
    """
    _unfuse(fused)
    for layer in layers:
        layer.products = None
        for parameter in layer.module.parameters():
            if id(parameter) in masters:
                parameter.data = masters[id(parameter)]


def build_stages(
    layers: Sequence[Layer],
    ranges: Sequence[range],
    devices: Sequence[Device],
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    recompute: Collection[int] = (),
    residencies: Sequence[str] = (),
) -> BuiltStages:
    """Move layers to their devices and give every stage leaves of its own.

    Weights that the host updates, and that come to a GPU for their stage's visits, stay on the CPU.

    Args:
        layers: the whole model.
        ranges: the layers of each stage.
        devices: the device of each stage; several stages may have the same one.
        loss_fn: what the last stage computes.
        recompute: indices of the layers that keep only their input for the backward.
        residencies: of each stage; default: all are resident.

    Raises:
        ValueError: a weight that the host cannot update.
    """
    placed = [[layers[i] for i in indices] for indices in ranges]
    loss = loss_part(loss_fn, layers)
    hosted = hosted_stages(devices, residencies)
    homes = [CPU if index in hosted else device.torch_device for index, device in enumerate(devices)]
    with contextlib.ExitStack() as undo:  # a device may have no room: ties and shared modules are the model's again
        twins = separate(placed)
        for twin in twins:
            undo.callback(twin.restore)
        parts = [*placed[:-1], [*placed[-1], *([] if loss is None else [loss])]]
        tied = untie(parts, homes)
        for use in tied:
            undo.callback(use.restore)
        below = weights_below(list(map(stage_weights, parts)), tied, residencies, host_updates=True) if hosted else []
        if loss is None or len(placed) - 1 not in hosted:
            move_loss(loss_fn, devices[-1].torch_device)
        stages = []
        for index, (own, device) in enumerate(zip(placed, devices)):
            if index in hosted:
                move_rest(parts[index], below[index], device.torch_device)
            else:
                for layer in own:
                    move_module(layer.module, device.torch_device)
            is_last = index == len(placed) - 1
            only_input = [i in recompute for i in ranges[index]]
            stages.append(
                Stage(index, own, device, is_last=is_last, loss_fn=loss_fn, recompute=only_input, parts=parts[index])
            )
        undo.pop_all()
    owned = _owned(parts, {id(use.alias) for use in tied})
    everything = {id(p): name for own in parts for layer in own for name, p in layer.named_parameters()}
    for stage in stages:
        stage.elsewhere = {key: everything[key] for key in everything.keys() - {id(p) for p in stage.parameters()}}
    for use in tied:
        use.restore()
    return BuiltStages(stages, owned, tied, twins)


def _owned(parts: Sequence[Sequence[Layer]], aliases: Collection[int]) -> list[dict[str, nn.Parameter]]:
    """Return the parameters that each stage trains, by name; aliases are given by id."""
    owned: list[dict[str, nn.Parameter]] = []
    for own in parts:
        names: dict[int, str] = {}
        parameters: dict[str, nn.Parameter] = {}
        for layer in own:
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and id(parameter) not in aliases and id(parameter) not in names:
                    names[id(parameter)] = name
                    parameters[name] = parameter
        owned.append(parameters)
    return owned
