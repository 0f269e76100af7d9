"""The numbers of metrics.jsonl for TensorBoard, in the run's folder ``tensorboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes each row of the metrics as scalars, "loss" as ``train/loss`` and "val_loss" as ``validation/loss``.

    Args:
        folder: where to; made if it is not there.
        done: steps done: what was written of later ones by a run that was killed is taken out.

    Raises:
        ValueError: TensorBoard is not installed; names the package.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    @staticmethod
    def check() -> None:
        """Raise ValueError if the package is missing."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ValueError("--tensorboard needs a package: pip install tensorboard") from error

    def add(self, row: dict[str, Any]) -> None:
        """Write the numbers of a row; an infinity, which JSON has as null, is left out."""
        group = "validation" if "val_loss" in row else "train"
        for key, value in row.items():
            if key not in ("step", "tokens") and isinstance(value, int | float) and key not in _EVENTS:
                self._writer.add_scalar(f"{group}/{key.removeprefix('val_')}", float(value), row["step"])

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


_EVENTS = ("saved", "best")
