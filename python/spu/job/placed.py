"""A run placed by a plan from a file: the settings that follow from it."""

from __future__ import annotations

from typing import Any

from spu.plan import Plan


def planned_settings(plan: Plan, given: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings of `TrainConfig` with those that the plan decides.

    Args:
        plan: of the run.
        given: settings named by the user.
        source: the plan's file, for messages.

    Raises:
        ValueError: the user has named a setting that the plan decides otherwise.
    """
    decided: dict[str, Any] = {
        "devices": ",".join(plan.devices),
        "schedule": plan.settings.schedule,
        "microbatches": plan.settings.microbatches,
        "accumulate": plan.settings.accumulate,
        "precision": plan.settings.precision,
        "transfer": "auto",  # each boundary as the plan says
        "recompute": "auto",  # each layer as the plan says
    }
    if plan.rows:
        decided["batch"] = plan.rows * plan.settings.parts
    if plan.tokens:
        decided["seq"] = plan.tokens
    for name, value in decided.items():
        if name in given and given[name] != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} {given[name]}, but {source} was made for {value}: leave the option out, or plan again"
            )
    return {**given, **decided}
