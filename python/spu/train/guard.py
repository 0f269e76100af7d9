"""The early end of a run: its loss is not finite or stays too high, every step is skipped, it no longer improves."""

from __future__ import annotations

import math
from collections.abc import Iterable

from spu.train.config import TrainConfig
from spu.train.job import Job
from spu.train.metrics import last_saved, read_metrics
from spu.trainer.trainer import StepResult

__all__ = ["MAX_BAD_LOSSES", "MAX_SKIPPED", "Guard", "Patience", "diverged"]

MAX_BAD_LOSSES = 5  # in a row; a skipped step leaves the weights alone, so that the next batch has its chance
MAX_SKIPPED = 40  # in a row: a loss scale of 2**16 has been halved to nothing by then


class Guard:
    """Watches the steps of a run, and ends one that cannot succeed.

    Attributes:
        sound: the last loss was finite, so that the weights are worth a checkpoint.
        high: steps in a row whose loss was above ``max_loss``: saving may wait for a better one.

    Raises (from ``check``):
        ValueError: the loss is not finite from the start or for some steps in a row, stays above ``max_loss``, or every
            step is skipped.
    """

    def __init__(self) -> None:
        self._bad = self._skipped = self.high = 0
        self._good = False
        self.sound = True

    def check(self, step: int, result: StepResult, config: TrainConfig) -> None:
        self.sound = math.isfinite(result.loss)
        self._bad = 0 if self.sound else self._bad + 1
        self._skipped = self._skipped + 1 if result.skipped else 0
        self.high = 0 if config.max_loss is None or result.loss <= config.max_loss else self.high + 1
        what = f"check the weights, --lr {config.lr:g} and --precision {config.precision}"
        if self._bad and (not self._good or self._bad >= MAX_BAD_LOSSES):
            when = "from the start" if not self._good else f"for {self._bad} steps"
            raise ValueError(f"the loss is {result.loss} {when} (step {step}): {what}, or train with --precision fp32")
        if self.high >= config.max_loss_steps:
            raise ValueError(
                f"the run diverged: its loss was above --max-loss {config.max_loss:g} for {self.high} steps, "
                f"{result.loss:.4g} at step {step}; what was saved before is kept: start a new run with a smaller --lr "
                f"than {config.lr:g}, or go on with --resume and a larger --max-loss"
            )
        if self._skipped >= MAX_SKIPPED:
            raise ValueError(
                f"{self._skipped} steps in a row were skipped, down to a loss scale of {result.loss_scale:g} (step "
                f"{step}): {what}, or give a smaller --init-scale"
            )
        self._good = self._good or not self._bad


class Patience:
    """Counts validations in a row without a lower loss than the lowest before.

    Args:
        limit: how many end the run; None for no limit.
        before: validation losses of the run so far, None for one that was not finite. Where they have ended it already,
            it goes on as asked, and counting begins anew.
    """

    def __init__(self, limit: int | None, before: Iterable[float | None] = ()) -> None:
        self._limit = limit
        self.lowest, self.stale = math.inf, 0
        for loss in before:
            self.add(math.nan if loss is None else loss)
        if self.spent:
            self.stale = 0

    def add(self, loss: float) -> None:
        """Count one more validation."""
        self.stale = 0 if loss < self.lowest else self.stale + 1
        self.lowest = loss if loss < self.lowest else self.lowest

    @property
    def spent(self) -> bool:
        """Whether the run is to end."""
        return self._limit is not None and self.stale >= self._limit

    def __str__(self) -> str:
        return f"the validation loss was not below {self.lowest:.4f} in the last {self.stale} validations"


def diverged(job: Job, what: str, step: int) -> ValueError:
    """Return the error that ends a run whose loss is not finite at its end."""
    config = job.config
    saved = last_saved(read_metrics(job.folder.metrics))
    kept = f"the checkpoint is that of step {saved}" if saved else "there is no checkpoint"
    less = f"a smaller --lr than {config.lr:g}" + ("" if config.precision == "fp32" else ", or --precision fp32")
    return ValueError(
        f"the run diverged: the {what} is not finite after step {step}; no model was written, and {kept}: start a new "
        f"run with {less}"
    )
