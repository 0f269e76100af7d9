"""The progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

__all__ = ["PlainView", "Progress", "RichView", "RunningMean", "View", "clock", "open_view", "terminal_width"]

_LINES = 20  # plain lines of a whole run
_WIDE = 130  # columns that everything needs; below, the bar and the time spent are left out
_SMOOTHING = 0.9  # of the shown training loss


@dataclass
class Progress:
    """Numbers of the last step, to be shown."""

    step: int
    loss: float
    tokens_per_s: float
    loss_scale: float | None = None
    skipped: int = 0
    val_loss: float | None = None


class View(Protocol):
    def update(self, progress: Progress) -> None: ...

    def say(self, text: str) -> None: ...


class RunningMean:
    """Exponential mean of the loss, without the bias towards its first value."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Return the mean with one more value, which is left out if it is not finite."""
        if math.isfinite(value):
            self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * value
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        return self._sum / self._weight if self._weight else value


class PlainView:
    """A line now and then: for logs and pipes."""

    def __init__(self, title: str, total: int, done: int, stream: TextIO) -> None:
        self._title, self._total, self._stream = title, total, stream
        self._every = max(1, total // _LINES)
        self._first, self._begin = done, time.monotonic()

    def update(self, progress: Progress) -> None:
        if progress.step % self._every and progress.step != self._total:
            return
        spent = time.monotonic() - self._begin
        left = spent / max(1, progress.step - self._first) * (self._total - progress.step)
        self.say(f"{self._title} {progress.step}/{self._total} {_describe(progress)} left {clock(left)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class RichView:
    """A live bar by rich."""

    def __init__(self, title: str, total: int, done: int, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._brief = console.width < _WIDE
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            *([] if self._brief else [BarColumn(bar_width=24)]),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            *([] if self._brief else [TimeElapsedColumn()]),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
        self._bar.start()

    def update(self, progress: Progress) -> None:
        self._bar.update(self._task, completed=progress.step, numbers=_describe(progress, self._brief))

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()


def terminal_width() -> int | None:
    """Return the columns of the terminal that is written to; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _describe(progress: Progress, brief: bool = False) -> str:
    parts = [f"loss {progress.loss:.3f}"]
    if progress.val_loss is not None:
        parts.append(f"val {progress.val_loss:.3f}")
    if progress.loss_scale is not None and (progress.skipped or not brief):
        parts.append(f"scale {progress.loss_scale:g} skipped {progress.skipped}")
    parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    return " ".join(parts)


def clock(seconds: float) -> str:
    """Return minutes and seconds, and hours where there are some: 2:05, 1:02:05."""
    whole = max(0, round(seconds))
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


@contextmanager
def open_view(title: str, total: int, done: int = 0) -> Iterator[View]:
    """Open a view of ``total`` steps, ``done`` of which were done before, on standard output."""
    if not sys.stdout.isatty():
        yield PlainView(title, total, done, sys.stdout)
        return
    from rich.console import Console

    view = RichView(title, total, done, Console())
    try:
        yield view
    finally:
        view.stop()
