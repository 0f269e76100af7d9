"""Figures beside what they have to reach, collected by the tests that measure them and printed when all are done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """One figure: ``measured`` as it is to be shown, and whether it is as good as ``wanted`` says."""

    what: str
    measured: str
    wanted: str
    reached: bool | None

    def __str__(self) -> str:
        mark = "" if self.reached is None else "reached" if self.reached else "SHORT"
        return f"{self.what:62} {self.measured:>22}   {self.wanted:16} {mark}".rstrip()


@dataclass
class Goals:
    """The rows of one session, under headings."""

    lines: list[str] = field(default_factory=list)

    def head(self, text: str) -> None:
        self.lines += ["", text]

    def note(self, what: str, measured: str) -> None:
        """A figure without a target."""
        self.lines.append(str(Goal(what, measured, "", None)))

    def at_least(self, what: str, value: float, wanted: float, unit: str = "") -> None:
        """Ratios are shown as such; with unit "%" value and target are shares of 1."""
        self.lines.append(str(Goal(what, _show(value, unit), f">= {_show(wanted, unit)}", value >= wanted)))

    def at_most(self, what: str, value: float, wanted: float, unit: str = "") -> None:
        self.lines.append(str(Goal(what, _show(value, unit), f"<= {_show(wanted, unit)}", value <= wanted)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)


def _show(value: float, unit: str) -> str:
    return f"{100 * value:.1f}%" if unit == "%" else f"{value:.2f}{unit}"


GOALS = Goals()
