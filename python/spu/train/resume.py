"""Going on with a run: what may differ from its saved configuration, and how it is made longer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spu.train.config import LENGTH, PLACEMENT, WATCHING, TrainConfig, option

__all__ = ["check_not_shorter", "resume_config"]


def resume_config(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Return the configuration to go on with: the saved one, placed, watched or made longer as asked.

    Args:
        saved: of the run.
        given: settings named on the command line.

    Raises:
        ValueError: a given setting that differs from the run's and would make it another run.
    """
    for name, value in given.items():
        old = getattr(saved, name)
        if name not in (*PLACEMENT, *LENGTH, *WATCHING) and not (value == old or _same_paths(name, value, old)):
            was = "default" if old is None else " ".join(old) if isinstance(old, tuple) else old
            value = " ".join(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"{option(name)} {value} differs from the run's {was}: leave it out to go on, or start a new run"
            )
    placed = dataclasses.replace(saved, **{name: given[name] for name in (*PLACEMENT, *WATCHING) if name in given})
    return _lengthened(placed, {name: given[name] for name in LENGTH if given.get(name) is not None})


def _same_paths(name: str, value: Any, old: Any) -> bool:
    """Tell whether two values of a setting that names files name the same ones."""
    if name not in ("model", "data", "val_data") or value is None or old is None:
        return False
    both = [[Path(path).resolve() for path in ((one,) if isinstance(one, str) else one)] for one in (value, old)]
    return both[0] == both[1]


def _lengthened(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Give a run more steps: its learning rate follows the longer schedule from the step where it goes on."""
    if not given or all(value == getattr(saved, name) for name, value in given.items()):
        return saved
    wanted = dataclasses.replace(saved, **{"steps": None, "tokens": None, "minutes": None, "epochs": None, **given})
    old, new = saved.planned_steps(), wanted.planned_steps()
    if new is None or old is None:  # epochs: the text is not read yet
        return wanted
    check_not_shorter(old, new, given)
    return wanted if old != new else saved


def check_not_shorter(old: int, new: int, given: dict[str, Any]) -> None:
    """Raise ValueError if a run of ``old`` steps is to end after ``new``."""
    if new < old:
        words = " ".join(f"{option(name)} {value:g}" for name, value in given.items())
        raise ValueError(f"{words}: the run has {old} steps, which can be raised but not lowered: give {old} or more")
