"""Which checkpoints of a run are kept: the last one, some before it, and that of the lowest validation loss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spu.checkpoint import writing
from spu.checkpoint.copies import keep_copy
from spu.common.units import format_bytes
from spu.train.metrics import MetricsFile, last_saved, validation_rows
from spu.train.run_folder import RunFolder
from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["Checkpoints", "disk_line"]

_STEP, _BEST = "step", "best"


class Checkpoints:
    """Saves a run's checkpoint and keeps copies of it, which share its files on the disk.

    ``checkpoint`` is the last one: the run goes on with it. Under ``checkpoints`` are ``step-N``, the last ``keep`` of
    them if that is more than one, and ``best-N`` if the best is asked for. Each appears and goes as a whole.

    Args:
        folder, metrics: of the run.
        rows: of the metrics so far.
        done: steps done; the checkpoint in the folder is of that step.
        keep: how many of the last ones.
        best: whether to keep the best one.

    Attributes:
        best_loss: validation loss of the best one that is kept; inf where there is none.
    """

    def __init__(
        self,
        folder: RunFolder,
        metrics: MetricsFile,
        rows: Iterable[dict[str, Any]],
        *,
        done: int,
        keep: int,
        best: bool,
    ) -> None:
        self._folder, self._metrics, self._keep, self._best = folder, metrics, keep, best
        rows = list(rows)
        chosen = {row["step"] for row in rows if row.get("best")}
        losses = {row["step"]: row["val_loss"] for row in validation_rows(rows) if row["val_loss"] is not None}
        self._clear(done)
        # One that is gone is no best one any more: an earlier checkpoint was put in place, and a better one removed
        chosen &= {_step_of(path) for path in self._kept(_BEST)}
        self.best_loss = min((loss for step, loss in losses.items() if step in chosen), default=math.inf)
        if done:
            self._catch_up(done, losses.get(done, math.nan), noted=last_saved(rows) >= done)

    def _clear(self, done: int) -> None:
        """Remove what a crash left half made, and checkpoints of later steps, if an earlier one was put in place."""
        for path in (self._folder / "checkpoints").glob(".*.new"):
            shutil.rmtree(path)
        for path in [*self._kept(_STEP), *self._kept(_BEST)]:
            if _step_of(path) > done:
                shutil.rmtree(path)
        for path in self._kept(_BEST)[:-1]:
            shutil.rmtree(path)

    def _catch_up(self, done: int, val_loss: float, *, noted: bool) -> None:
        """Keep the checkpoint that the run goes on with, and note it, if a crash came between saving it and that."""
        writing.settle(self._folder.checkpoint)
        if self._keep > 1 and not self._place(_STEP, done).exists():
            keep_copy(self._folder.checkpoint, self._place(_STEP, done))
        if self.improves(val_loss):
            self._keep_best(done, val_loss)
        elif not noted:
            self._metrics.append(step=done, saved=True)

    def improves(self, val_loss: float) -> bool:
        """Tell whether weights of this validation loss are to be saved as the best."""
        return self._best and val_loss < self.best_loss  # NaN is not

    def save(self, trainer: ModelParallelTrainer, step: int, best: float | None = None) -> None:
        """Save the checkpoint of a step, note it in the metrics, and drop what is no longer to be kept.

        Args:
            trainer: after that step.
            step: its number.
            best: the validation loss after it, if that is the lowest so far.
        """
        trainer.save(self._folder.checkpoint)
        if self._keep > 1:
            keep_copy(self._folder.checkpoint, self._place(_STEP, step))
        for path in self._kept(_STEP)[: -self._keep if self._keep > 1 else None]:
            shutil.rmtree(path)
        if best is None:
            self._metrics.append(step=step, saved=True)
        else:
            self._keep_best(step, best)

    def _keep_best(self, step: int, val_loss: float) -> None:
        keep_copy(self._folder.checkpoint, self._place(_BEST, step))
        self._metrics.append(step=step, saved=True, best=True)
        self.best_loss = val_loss
        for path in self._kept(_BEST)[:-1]:
            shutil.rmtree(path)

    def best(self) -> tuple[int, Path] | None:
        """Return (step, folder) of the best checkpoint; None if none was kept."""
        kept = self._kept(_BEST)
        return (_step_of(kept[-1]), kept[-1]) if kept else None

    def _place(self, kind: str, step: int) -> Path:
        return self._folder / "checkpoints" / f"{kind}-{step:08d}"

    def _kept(self, kind: str) -> list[Path]:
        return sorted((self._folder / "checkpoints").glob(f"{kind}-*"))


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def disk_line(folder: RunFolder, trained: int, parameters: int, *, keep: int, best: bool) -> str:
    """Return a line about the disk that a run takes at most, with a warning where there is less.

    Args:
        folder: of the run; it exists.
        trained: parameters that are trained: a checkpoint has up to 12 bytes of each, for fp32 value and moments.
        parameters: of the whole model; 4 bytes each in a checkpoint if frozen, and in the exported model.
        keep, best: of ``Checkpoints``.
    """
    one = 12 * trained + 4 * (parameters - trained)
    kept = keep + best
    need, free = (kept + 1) * one + 4 * parameters, shutil.disk_usage(folder.path).free
    kept_ones = (
        f"{kept} checkpoint{'s' if kept > 1 else ''} of {format_bytes(one)}, another while it is written, and the model"
    )
    line = f"disk: up to {format_bytes(need)} in {folder.path}: {kept_ones}; {format_bytes(free)} are free"
    return line if free > need else f"{line}: make room, or give a smaller --keep or another --out"
