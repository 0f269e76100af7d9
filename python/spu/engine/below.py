"""Which weights of streamed stages lie below their device, and what of such stages is moved to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

from spu.common.absent import absent
from spu.common.moves import move_module
from spu.common.torch_private import parameters_of
from spu.devices.manager import Device
from spu.engine.sharing import TiedUse
from spu.model.layers import Layer

__all__ = ["CPU", "hosted_stages", "leave_empty", "move_rest", "stage_weights", "weights_below"]

CPU = torch.device("cpu")


def hosted_stages(devices: Sequence[Device], residencies: Sequence[str]) -> set[int]:
    """Return the stages whose weights are on the CPU between runs, and are updated there: those below a GPU.

    Args:
        devices: of each stage.
        residencies: of each stage; none: all are resident.
    """
    each = zip(devices, residencies, strict=True) if residencies else ()
    return {k for k, (device, how) in enumerate(each) if how != "resident" and device.torch_device.type != "cpu"}


def stage_weights(parts: Sequence[Layer]) -> list[nn.Parameter]:
    """Return the parameters of a stage's layers, each once."""
    return list({id(p): p for layer in parts for _, p in layer.named_parameters()}.values())


def weights_below(
    stages: Sequence[Sequence[nn.Parameter]], tied: Sequence[TiedUse], residencies: Sequence[str], *, host_updates: bool
) -> list[dict[int, nn.Parameter]]:
    """Return, by id, the weights of each stage that lie below its device and come for its visits.

    Of a streamed stage these are all, except integers and weights in another order of memory than the slots', on which
    the bits of a kernel's result may depend; of an offloaded one none, or the trained ones if the host updates them. A
    weight of several stages lies below if it does so for all of them.

    Args:
        stages: the parameters of each.
        tied: uses of parameters in several stages.
        residencies: "resident", "offloaded" or "streamed", of each stage.
        host_updates: the host updates what is below.

    Raises:
        ValueError: the host is to update a weight that stays on the device.
    """
    owner_of = {id(use.alias): use.owner for use in tied}
    users: dict[int, set[int]] = {}
    for use in tied:
        users.setdefault(id(use.owner), set()).update((use.owner_stage, use.stage))

    def lies_below(parameter: nn.Parameter, stage: int) -> bool:
        if residencies[stage] == "resident" or not parameter.is_floating_point() or not parameter.is_contiguous():
            return False
        trained = owner_of.get(id(parameter), parameter).requires_grad
        return residencies[stage] == "streamed" or (host_updates and trained)

    there = [{id(owner_of.get(id(p), p)) for p in own if lies_below(p, k)} for k, own in enumerate(stages)]
    result: list[dict[int, nn.Parameter]] = []
    for k, own in enumerate(stages):
        found = {}
        for parameter in own:
            key = id(owner_of.get(id(parameter), parameter))
            if all(key in there[user] for user in users.get(key, {k})):
                found[id(parameter)] = parameter
            elif (
                host_updates
                and residencies[k] != "resident"
                and parameter.requires_grad
                and id(parameter) not in owner_of
            ):
                why = "is used by a resident stage too" if parameter.is_contiguous() else "is not contiguous"
                raise ValueError(
                    f"a trained weight of shape {tuple(parameter.shape)} in stage {k} {why}, so that it stays on the "
                    "device, but the host updates it: make it contiguous, give all its stages the same residency, or "
                    "train with residency='resident'"
                )
        result.append(found)
    return result


def leave_empty(empty: Collection[int], weights: Iterable[nn.Parameter]) -> None:
    """Put stand-ins in the place of weights that have memory and no values yet, before they move to a store.

    A store begins with zeros: copying memory without values there would write every byte of a disk's file once more.

    Args:
        empty: ids of such weights.
        weights: those that move.
    """
    for weight in weights:
        if id(weight) in empty:
            weight.data = absent(weight.shape, weight.dtype)


def move_rest(parts: Sequence[Layer], below: dict[int, nn.Parameter], device: torch.device) -> None:
    """Move to a device what a stage keeps there: its buffers, and the parameters that do not lie below.

    Args:
        parts: the stage's layers.
        below: its parameters that lie below, by id.
        device: where the stage computes.
    """
    away: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in (module for layer in parts for module in layer.module.modules()):
        for name, parameter in parameters_of(module).items():
            if parameter is not None and id(parameter) in below:
                away.append((module, name, parameter))
    try:
        for module, name, _ in away:
            parameters_of(module)[name] = None
        for layer in parts:
            move_module(layer.module, device)
    finally:
        for module, name, parameter in away:
            parameters_of(module)[name] = parameter
