"""The optimizer that a ``transformers.Trainer`` and its schedulers see, and the ones that update each stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from spu.optim.adamw import AdamW

__all__ = ["FrontOptimizer", "GroupedAdamW", "set_rates"]

DECAYED = "decayed"


class GroupedAdamW(AdamW):
    """AdamW whose parameters are in two groups: those that decay, and those that do not. A stage has both, also where
    one is empty (an embedding's, a last norm's): so a checkpoint goes on with other stages, which share parameters out
    in another way.

    Args:
        params: of a stage.
        undecayed: ids of the parameters without weight decay.
        weight_decay: of the others.
        keywords: as `AdamW`'s.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, undecayed: Collection[int], weight_decay: float, **keywords: Any
    ) -> None:
        own = list(params)
        groups = [
            {"params": [p for p in own if id(p) not in undecayed], "weight_decay": weight_decay, DECAYED: True},
            {"params": [p for p in own if id(p) in undecayed], "weight_decay": 0.0, DECAYED: False},
        ]
        super().__init__(groups, **keywords)


def set_rates(optimizers: Iterable[Any], front: Sequence[dict[str, Any]]) -> None:
    """Give every stage's groups the rates and settings that the front's two groups have now."""
    for optimizer in optimizers:
        for group in () if optimizer is None else optimizer.param_groups:
            given = front[0 if group[DECAYED] else 1]
            group.update({key: given[key] for key in ("lr", "weight_decay", "betas", "eps")})


class _Elsewhere(dict[Any, Any]):
    """The state of an optimizer that has none: looks empty, and refuses to be asked for a parameter's or changed."""

    def _refuse(self, *arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError(
            "SpuTrainer's moments are in the engine's optimizers, one for each stage: they cannot be read or changed "
            "through trainer.optimizer.state; use transformers.Trainer for that"
        )

    __getitem__ = __setitem__ = __delitem__ = __contains__ = _refuse  # type: ignore[assignment]
    get = pop = clear = update = setdefault = _refuse  # type: ignore[assignment]


class FrontOptimizer(torch.optim.Optimizer):
    """Holds rates for schedulers and callbacks; its ``step`` is the engine's update. It has no state of its own.

    Args:
        groups: the parameters that decay, and those that do not.
        defaults: lr, betas, eps.
        update: runs the update; returns whether it was skipped.
    """

    step_was_skipped = False  # accelerate asks for it

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], update: Callable[[], bool]) -> None:
        super().__init__(groups, defaults)
        self.state = _Elsewhere()  # type: ignore[assignment]
        self._update = update

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the model.

        Raises:
            ValueError: a closure, which would run the model a second time.
        """
        if closure is not None:
            raise ValueError("step(closure) is not possible here: the gradients are there already")
        self.step_was_skipped = self._update()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the groups' settings."""
        super().load_state_dict(state_dict)
        self.state = _Elsewhere()  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine forgets gradients when the next step begins."""
