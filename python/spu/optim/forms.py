"""The forms of a trainer's optimizer state, as settings of AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from spu.optim.adamw import AdamW

__all__ = ["FORMS", "in_form", "is_ours"]

FORMS = {
    "fp32": {"master": "fp32", "moments": "fp32"},
    "exact": {"master": "16bit", "moments": "int8"},
    "compact": {"master": "8bit", "moments": "int8"},
}
"""The setting ``state`` -> keywords of ``AdamW``."""

Factory = Callable[..., torch.optim.Optimizer]


def is_ours(factory: Any) -> bool:
    """Tell whether a class, or a ``functools.partial`` of one, makes our AdamW, which keeps masters by itself."""
    made = factory.func if isinstance(factory, partial) else factory
    return isinstance(made, type) and issubclass(made, AdamW)


def in_form(factory: Factory | None, lr: float | None, state: str) -> Factory | None:
    """Return what makes a trainer's optimizer with its state in a form; the given factory itself for "fp32".

    Args:
        factory: as ``ModelParallelTrainer`` takes it; None for our AdamW.
        lr: the learning rate for a class; None for its own.
        state: one of ``FORMS``.

    Raises:
        ValueError: the factory makes another optimizer, or sets a form of its own.
    """
    if state == "fp32":
        return factory
    made: Any = AdamW if factory is None else factory
    if not is_ours(made):
        name = getattr(made.func if isinstance(made, partial) else made, "__name__", repr(made))
        raise ValueError(
            f"state={state!r} is a form of spu.optim.AdamW's state, but the optimizer is {name}: give spu.optim.AdamW, "
            "a subclass or a functools.partial of it, or state='fp32'"
        )
    wanted = FORMS[state]
    if isinstance(made, partial):
        for key, value in wanted.items():
            if made.keywords.get(key, value) != value:
                raise ValueError(
                    f"state={state!r} is {key}={value!r}, but the optimizer was given {key}={made.keywords[key]!r}: "
                    "leave one of them out"
                )
    elif lr is not None:
        made = partial(made, lr=lr)
    return partial(made, **wanted)
