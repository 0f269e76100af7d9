"""metrics.jsonl: one line for each step, validation and checkpoint, appended as they happen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spu.common.files import naming, write_atomically, write_json

__all__ = ["MetricsFile", "last_saved", "read_metrics", "save_result", "train_rows", "validation_rows"]


def _finite(value: Any) -> Any:
    """Replace infinities, such as a skipped step's gradient norm, by None: JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends rows; every row has "step", the number of steps done.

    Args:
        path: the file.
        also: takes each row as well, as JSON has it.
    """

    def __init__(self, path: Path, also: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self._also = path, also

    def keep_up_to(self, step: int) -> None:
        """Drop what was written after ``step`` (a killed run is ahead of its checkpoint), and a torn last line."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, **row: Any) -> None:
        row = {key: _finite(value) for key, value in row.items()}
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._also is not None:
            self._also(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file without a last line that a crash cut short. A missing file has none."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def train_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of training steps."""
    return [row for row in rows if "loss" in row]


def validation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of validations."""
    return [row for row in rows if "val_loss" in row]


def last_saved(rows: list[dict[str, Any]]) -> int:
    """Return the last step of which a checkpoint was written; 0 if there is none."""
    return max((row["step"] for row in rows if row.get("saved")), default=0)


def save_result(path: Path, values: dict[str, Any]) -> None:
    """Write a result's numbers, infinities as null."""
    write_json(path, {key: _finite(value) for key, value in values.items()})
