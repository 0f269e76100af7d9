"""Where a model's layers go: costs of its layers on fake tensors, a plan under the devices' budgets, and its checks."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spu.common.dtypes import DTYPES
from spu.common.torch_private import is_fake, pytree
from spu.common.units import format_bytes
from spu.cost.count import Run, loss_run, training_costs
from spu.cost.measure import Detached
from spu.devices.manager import Device
from spu.devices.speed import measure_device
from spu.engine.microbatch import batch_rows
from spu.model.layers import Layer, Moment
from spu.model.stand_in import unmade_parameter
from spu.plan import Plan, make_plan, partition
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.settings import AUTO, Recompute, Settings
from spu.skips import carried_by

__all__ = [
    "check_fits",
    "check_made",
    "check_plan",
    "counted_machine",
    "model_costs",
    "no_loss",
    "peak_bytes",
    "place_parts",
    "plan_model",
    "tokens_of",
]

LossFn = Callable[[Any, Any], torch.Tensor]


def plan_model(
    layers: Sequence[Layer],
    sample: Any,
    devices: Sequence[Device],
    settings: Settings,
    *,
    loss_fn: LossFn | None = None,
    targets: Any = None,
) -> Plan:
    """Balance the layers' counted costs over the devices, under every device's budget.

    Costs are counted, not measured, so that the same command gives the same stages, and so the same bits, every time.

    Args:
        layers: the model, in any precision; nothing of it is changed.
        sample: one microbatch of inputs.
        settings: of the training, with a schedule and a number of microbatches.
        loss_fn, targets: the loss and one microbatch of its targets; default: a cross entropy over the outputs.

    Raises:
        ValueError: more stages than layers, or a layer that cannot be run on fake tensors.
        BudgetError: no placement fits.
    """
    each = settings.stages_per_rank
    if len(devices) * each > len(layers):
        on_each = f" with {each} stages on each" if each > 1 else ""
        raise ValueError(
            f"{len(devices)} devices{on_each} for {len(layers)} layers: every stage needs a layer; "
            f"pass at most {len(layers) // each} devices"
        )
    costs, loss = model_costs(layers, sample, settings, loss_fn, targets)
    return make_plan(
        costs,
        counted_machine(devices, settings.precision),
        settings,
        loss_cost=loss,
        max_microbatches=settings.run_microbatches * batch_rows(sample),
        rows=batch_rows(sample),
        tokens=tokens_of(sample),
    )


def model_costs(
    layers: Sequence[Layer],
    sample: Any,
    settings: Settings,
    loss_fn: LossFn | None = None,
    targets: Any = None,
) -> tuple[list[LayerCost], LayerCost | None]:
    """Costs of a model's layers, and of its loss if there are targets, for one microbatch in training.

    Raises:
        ValueError: a layer cannot be run on fake tensors.
    """

    rehearsal, dtype = Detached(), DTYPES[settings.precision]
    products = dtype if dtype.itemsize == 2 else None

    def run(layer: Layer) -> Run:
        def call(module: nn.Module, x: Any) -> Any:
            with carried_by(rehearsal):
                return replace(layer, module=module, products=products).run(x, sample, _ANY)

        # Only of decoders' layers is it known that nothing else tells them apart.
        return Run(layer.name, layer.module, call, alike=layer.wants_inputs)

    runs = [run(layer) for layer in layers]
    if loss_fn is not None and targets is not None:
        runs.append(loss_run(loss_fn, targets))
    costs = training_costs(runs, sample, dtype, fused=settings.fused, real=_has_values(layers, sample))
    return (costs[:-1], costs[-1]) if len(costs) > len(layers) else (costs, None)


_ANY = Moment(0, 0, 1)


def check_made(layers: Sequence[Layer]) -> None:
    """Whether every parameter has a shape.

    Raises:
        ValueError: one of a lazy module has none yet; names it.
    """
    for layer in layers:
        name = unmade_parameter(layer.module)
        if name is not None:
            kind = type(layer.module).__name__
            raise ValueError(
                f"layer {layer.name!r} has a parameter without a shape yet, {name!r} of a {kind}: call the model once "
                "on a sample batch, model(inputs), before it is given to the trainer"
            )


def _has_values(layers: Sequence[Layer], sample: Any) -> bool:
    """Whether a layer can be run for real: False for a model on the meta device, or one without parameters to tell."""
    state = [p for layer in layers for p in layer.module.parameters()]
    given = [t for t in pytree.tree_leaves(sample) if isinstance(t, torch.Tensor)]
    return not any(t.is_meta or is_fake(t) for t in [*given, *state])


def counted_machine(devices: Sequence[Device], precision: str) -> Machine:
    """Return the machine that counted costs are balanced over; only its work takes time.

    CPUs are as fast as they have threads, so that the same command gives the same stages every time; as soon as there
    is a GPU, every device is as fast as it was measured once.
    """
    count = len(devices)
    rest = (Speed(),) * count, dict.fromkeys(itertools.permutations(range(count), 2), math.inf)
    if all(device.torch_device.type == "cpu" for device in devices):
        threads = [device.threads for device in devices]
        made_up = {device.name: "50 GFLOP/s a thread" for device in devices}
        return Machine(
            tuple(devices), tuple(5e10 * t for t in threads), tuple(5e9 * t for t in threads), *rest, made_up
        )
    measured = [measure_device(device) for device in devices]
    flops = tuple(max(getattr(m, precision), 1.0) for m in measured)
    return Machine(tuple(devices), flops, tuple(m.memory_bandwidth for m in measured), *rest)


def no_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Stands for the loss where there are no targets."""
    return outputs.float().mean()


def tokens_of(sample: Any) -> int:
    """Tokens of a sequence, where the sample is of token ids; else 0."""
    ids = sample.get("input_ids") if isinstance(sample, dict) else sample
    return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() else 0


def check_plan(plan: Plan, layers: Sequence[Layer], devices: Sequence[Device], settings: Settings) -> None:
    """Whether a plan made elsewhere, or by hand, is one for this model, these devices and the trainer's settings.

    Args:
        settings: of the trainer; what is "auto" is the plan's to decide.

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
    for name in Settings.names():
        planned_for, asked = _settled(plan, settings, name)
        if planned_for != asked:
            raise ValueError(
                f"the plan is for {name}={planned_for!r}, but the trainer has {asked!r}; make them equal, or plan again"
            )


def _settled(plan: Plan, settings: Settings, name: str) -> tuple[Any, Any]:
    """Return what a plan has decided about a setting, and what is asked, in the same form."""
    asked = getattr(settings, name)
    if asked in (AUTO, Recompute("auto")):
        return None, None
    if name == "virtual":
        return (None, None) if settings.schedule == AUTO else (plan.virtual, settings.stages_per_rank)
    if name == "recompute":  # by what the stages do: a plan may have been made with "auto"
        if asked.mode == "given":
            return sorted(plan.recomputed_layers), sorted(asked.layers)
        return plan.recompute, asked.mode == "all"
    if name == "transfer":  # between two devices: within one nothing is packed
        crossed = [before.device != after.device for before, after in itertools.pairwise(plan.stages)]
        return plan.codecs, tuple(asked if other else codec for other, codec in zip(crossed, plan.codecs))
    return getattr(plan.settings, name), asked


def check_fits(plan: Plan, devices: Sequence[Device], sample: Any) -> None:
    """Whether what a plan needs is within these devices' budgets, and microbatches like ``sample`` within the plan.

    Raises:
        ValueError: a budget is smaller than the plan's peak, or the sample has more rows or tokens than it counted.
    """
    for device, peak in zip(devices, plan.predicted.peak_bytes, strict=True):
        if peak > device.budget_bytes:
            raise ValueError(
                f"the plan needs {format_bytes(peak)} on {device.name}, whose budget is "
                f"{format_bytes(device.budget_bytes)}: plan again, or give it more"
            )
    for what, planned, given in (
        ("rows", plan.rows, batch_rows(sample)),
        ("tokens", plan.tokens, tokens_of(sample)),
    ):
        if 0 < planned < given:
            raise ValueError(f"the plan is for microbatches of {planned} {what}, these have {given}: plan again")


def place_parts(layers: Sequence[Layer], devices: Sequence[Device]) -> list[Device]:
    """A device for each part of a hand-run model: one each where there are enough, else runs of equal bytes."""
    if len(layers) <= len(devices):
        return list(devices[: len(layers)])
    sizes = [1.0 + sum(p.numel() * p.element_size() for p in layer.module.parameters()) for layer in layers]
    ranges = partition(sizes, len(devices))
    return [device for indices, device in zip(ranges, devices) for _ in indices]


def peak_bytes(devices: Sequence[Device]) -> dict[str, int]:
    """The most memory in use so far: of each GPU by torch's allocator, and of the whole process for the CPU."""
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
