"""Where a model's layers go: costs of its layers on fake tensors, a plan under the devices' budgets, and its checks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spu import profile, schedules
from spu.devices import Device
from spu.engine.build import DTYPES
from spu.engine.layers import Layer, Moment
from spu.engine.microbatch import batch_rows
from spu.plan import Plan, make_plan, partition
from spu.skips import Rehearsal, carried_by

__all__ = ["check_plan", "measure_plan", "peak_bytes", "place_parts", "plan_model"]


def plan_model(
    layers: Sequence[Layer],
    sample: Any,
    devices: Sequence[Device],
    *,
    schedule: str,
    microbatches: int,
    accumulate: int,
    precision: str,
    codec: str | None,
    recompute: str | bool,
    virtual: int | None = None,
) -> Plan:
    """Balance the layers' estimated costs over the devices, under every device's budget.

    Costs are counted, not measured, so that the same command gives the same stages, and so the same bits, every time.

    Args:
        layers: the model, in any precision; nothing of it is changed.
        sample: one microbatch of inputs.

    Raises:
        ValueError: more stages than layers, or a layer that cannot be run on fake tensors.
        BudgetError: no placement fits.
    """
    each = schedules.stages_per_rank(schedule, virtual)
    if len(devices) * each > len(layers):
        on_each = f" with {each} stages on each" if each > 1 else ""
        raise ValueError(
            f"{len(devices)} devices{on_each} for {len(layers)} layers: every stage needs a layer; "
            f"pass at most {len(layers) // each} devices"
        )
    costs = profile.estimate_layers(
        [(layer.name, layer.module) for layer in layers],
        sample,
        call=_caller(layers, sample),
        dtype=DTYPES[precision],
    )
    return make_plan(
        costs,
        devices,
        schedule=schedule,
        microbatches=microbatches,
        accumulate=accumulate,
        precision=precision,
        codec=codec or "none",
        recompute=recompute,
        max_microbatches=microbatches * batch_rows(sample),
        virtual=virtual,
    )


def measure_plan(plan: Plan, layers: Sequence[Layer], sample: Any, devices: Sequence[Device]) -> Plan:
    """The same plan with predicted times that rest on measured layers.

    Args:
        layers: the model in the plan's precision; each layer is run a few times on the first device.
        sample: one microbatch of inputs.
    """
    named = [(layer.name, layer.module) for layer in layers]
    return make_plan(
        profile.measure_layers(named, sample, call=_caller(layers, sample), device=devices[0]),
        devices,
        schedule=plan.schedule,
        microbatches=plan.microbatches,
        accumulate=plan.accumulate,
        precision=plan.precision,
        codec=plan.transfer,
        recompute=plan.recompute,
        model=plan.model,
        layers=[stage.layers for stage in plan.stages],
        virtual=plan.virtual,
    )


def _caller(layers: Sequence[Layer], inputs: Any) -> Any:
    by_module = {id(layer.module): layer for layer in layers}
    rehearsal = Rehearsal()

    def call(module: nn.Module, x: Any) -> Any:
        with carried_by(rehearsal):
            return by_module[id(module)].run(x, inputs, Moment(0, 0, 0))

    return call


def check_plan(plan: Plan, layers: Sequence[Layer], devices: Sequence[Device], **settings: Any) -> None:
    """Whether a plan made elsewhere, or by hand, is one for this model, these devices and the trainer's settings.

    Args:
        settings: what the plan must have been made for, by the plan's names for them.

    Raises:
        ValueError: it is not; the message says where.
    """
    names = [layer.name for layer in layers]
    if len(plan.devices) != len(devices):
        raise ValueError(
            f"the plan is for {len(plan.devices)} devices, but there are {len(devices)} devices; make them equal"
        )
    planned = [name for stage in plan.stages for name in stage.layer_names]
    if planned != names:
        at = next((i for i, (a, b) in enumerate(zip(planned, names)) if a != b), min(len(planned), len(names)))
        raise ValueError(
            f"the plan is for another model: it has {len(planned)} layers and this one {len(names)}, "
            f"and they differ at layer {at}; plan again"
        )
    for name, given in settings.items():
        planned_for = getattr(plan, name)
        if planned_for != given:
            raise ValueError(
                f"the plan is for {name}={planned_for!r}, but the trainer has {given!r}; make them equal, or plan again"
            )


def place_parts(layers: Sequence[Layer], devices: Sequence[Device]) -> list[Device]:
    """A device for each part of a hand-run model: one each where there are enough, else runs of equal bytes."""
    if len(layers) <= len(devices):
        return list(devices[: len(layers)])
    sizes = [1.0 + sum(p.numel() * p.element_size() for p in layer.module.parameters()) for layer in layers]
    ranges = partition(sizes, len(devices))
    return [device for indices, device in zip(ranges, devices) for _ in indices]


def peak_bytes(devices: Sequence[Device]) -> dict[str, int]:
    """The most memory in use so far: of each card by torch's allocator, and of the whole process for the CPU."""
    peaks = {}
    for device in devices:
        if device.torch_device.type == "cuda":
            peaks[device.name] = torch.cuda.max_memory_allocated(device.torch_device)
        else:
            peaks["cpu"] = _peak_resident_bytes()
    return peaks


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
