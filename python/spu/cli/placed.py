"""A run placed by a plan from a file: the settings that follow from it."""

from __future__ import annotations

from typing import Any

from spu.plan import Plan
from spu.settings import AUTO, Recompute
from spu.train.config import option

__all__ = ["planned_settings"]


def planned_settings(plan: Plan, given: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of ``TrainConfig`` with those that the plan decides.

    Args:
        plan: of the run.
        given: settings named by the user.
        source: the plan's file, for messages.

    Raises:
        ValueError: the user has given a setting another value than the plan.
    """
    decided: dict[str, Any] = {
        **{name: getattr(plan.settings, name) for name in plan.settings.names()},
        "devices": ",".join(plan.devices),
        "transfer": AUTO,  # each boundary as the plan says
        "recompute": Recompute.of(AUTO),  # each layer as the plan says
    }
    if plan.rows:
        decided["batch"] = plan.rows * plan.settings.parts
    if plan.tokens:
        decided["seq"] = plan.tokens
    for name, value in decided.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"{option(name)} {given[name]}, but {source} was made for {value}: leave the option out, or plan again"
            )
    return {**given, **decided}
