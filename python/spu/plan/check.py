"""Checks of a plan that was made elsewhere, or by hand: is it for this model, these devices and these settings?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spu.common.units import format_bytes
from spu.plan.plan import Plan
from spu.settings import AUTO, Recompute, Settings

if TYPE_CHECKING:
    from spu.devices.manager import Device
    from spu.devices.tiers import Tiers

__all__ = ["check_fits", "check_plan", "used_devices"]


def used_devices(plan: Plan, devices: Sequence[Device]) -> list[Device]:
    """Return those of a trainer's devices that a plan runs on, by rank: all, unless layers are streamed.

    Names count only where there are more devices than the plan uses: another machine may name them otherwise.
    """
    count = len(plan.devices)
    if plan.streaming is None or len(devices) <= count:
        return list(devices)
    kind = plan.devices[0].split(":")[0]
    named = [device for device in devices if device.name in plan.devices]
    alike = [device for device in devices if device.name.startswith(kind)]
    return next((found for found in (named, alike) if len(found) >= count), list(devices))[:count]


def check_plan(plan: Plan, names: Sequence[str], devices: Sequence[Device], settings: Settings) -> None:
    """Check that a plan is for this model, these devices and the trainer's settings.

    Args:
        names: of the model's layers, in order.
        settings: of the trainer; what is "auto" is the plan's to decide.

    Raises:
        ValueError: it is not; the message says where.
    """
    devices = used_devices(plan, devices)
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
    if plan.streaming is None and name in ("residency", "activations"):
        return ("resident", asked) if name == "residency" else (None, None)
    if plan.streaming is not None and name in ("schedule", "virtual"):  # there is one order of streaming
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


def check_fits(plan: Plan, devices: Sequence[Device], rows: int, tokens: int, tiers: Tiers) -> None:
    """Check that a plan's peaks are within these budgets, and that these microbatches are no larger than its.

    Raises:
        ValueError: a budget is smaller than the plan's peak, or a microbatch has more rows or tokens than it counted.
    """
    used = used_devices(plan, devices)
    needs = [(d.name, peak, d.budget_bytes) for d, peak in zip(used, plan.predicted.peak_bytes, strict=True)]
    budgets = {"host": tiers.host_bytes, "disk": tiers.disk_bytes}
    if plan.streaming is not None:
        needs += [(tier.name, tier.peak_bytes, budgets[tier.name]) for tier in plan.streaming.below]
    for name, peak, budget in needs:
        if peak > budget:
            raise ValueError(
                f"the plan needs {format_bytes(peak)} on {name}, whose budget is {format_bytes(budget)}: plan again, "
                "or give it more"
            )
    for what, planned, given in (("rows", plan.rows, rows), ("tokens", plan.tokens, tokens)):
        if 0 < planned < given:
            raise ValueError(f"the plan is for microbatches of {planned} {what}, these have {given}: plan again")
