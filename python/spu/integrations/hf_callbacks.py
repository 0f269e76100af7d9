"""What callbacks of a ``transformers.Trainer`` see of the model while layers are streamed: its present weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import transformers

__all__ = ["ShownWeights", "watchers"]

_BETWEEN = "on_pre_optimizer_step"  # gradients and update; refused over streamed layers
_EVENTS = [name for name in vars(transformers.TrainerCallback) if name.startswith("on_") and name != _BETWEEN]


def watchers(callbacks: Iterable[Any], event: str = _BETWEEN) -> list[str]:
    """Return the names of the callbacks that do something at an event, but for those of transformers.

    Between gradients and update (the default) theirs count too: whatever is called there may change gradients.
    """
    plain = getattr(transformers.TrainerCallback, event)
    found = (type(callback) for callback in callbacks if getattr(type(callback), event, plain) is not plain)
    own = event != _BETWEEN
    return [kind.__name__ for kind in found if not own or not kind.__module__.startswith(("transformers.", "spu."))]


class ShownWeights(transformers.TrainerCallback):  # type: ignore[misc]
    """The first callback of all: shows the weights before each event that code of the user's listens to.

    Streamed and offloaded layers are updated at their next visit; until then their weights read as NaN, and an average
    of them (``torch.optim.swa_utils.AveragedModel``) would be NaN.

    Args:
        callbacks: all callbacks, as they are at each event.
        show: gives the model its present weights.
    """

    def __init__(self, callbacks: Sequence[Any], show: Callable[[], None]) -> None:
        self._callbacks, self._show = callbacks, show


def _at(event: str) -> Callable[..., None]:
    def shown(self: ShownWeights, *_: Any, **__: Any) -> None:
        if watchers(self._callbacks, event):
            self._show()

    return shown


for _event in _EVENTS:
    setattr(ShownWeights, _event, _at(_event))
