"""What a CPU of each kind must reach, and the figures beside it: the table that closes ``make bench``.

Ratios of one run, calls in turns, on the CPU that it runs on. Kinds are never mixed: a column is that of the
instruction set in use.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

KINDS = ("AMX", "AVX-512", "AVX2")
# by figure: the ratio to reach on each kind of CPU; None: it has no such figure
TARGETS: dict[str, tuple[float | None, ...]] = {
    "bf16 linear into main_grad, beside torch bf16 with cast, unscale, add": (1.3, 1.1, 10.0),
    "fp16 linear into main_grad, beside torch fp16 the same way": (2.5, 10.0, 10.0),
    "fp16 linear into main_grad, beside torch fp32": (2.5, 1.0, 1.0),
    "decoder step bf16, a loop's, beside torch bf16 autocast": (2.0, 1.3, 10.0),
    "decoder step bf16, the trainer's, beside the same": (2.0, 1.3, 10.0),
    "decoder step fp16, a loop's, beside torch fp32": (3.0, 1.2, 1.1),
    "decoder step fp16, the trainer's, beside the same": (3.0, 1.2, 1.1),
    "main job (fp16, two stages), beside --reference": (2.0, 1.4, 1.25),
    "two stages, beside one stage with two threads, planner's choice": (1.1, 1.1, 1.1),
    "any op, beside torch's": (0.95, 0.95, 0.95),
    "fp16 split: torch fp16's error over ours, gradients of 1e-7 to 1e4": (1.0, None, None),
}
LARGE_STEP = {  # the rows of test_dropin's large decoder step, by peer
    "spu bf16": "decoder step bf16, a loop's, beside torch bf16 autocast",
    "spu trainer bf16": "decoder step bf16, the trainer's, beside the same",
    "spu fp16": "decoder step fp16, a loop's, beside torch fp32",
    "spu trainer fp16": "decoder step fp16, the trainer's, beside the same",
}


def kind() -> str:
    """Return which of ``KINDS`` the kernels in use belong to."""
    isa = importlib.import_module("spu._C").isa()
    return {"amx": "AMX", "avx512": "AVX-512", "avx512bf16": "AVX-512"}.get(isa, "AVX2")


def target(what: str) -> float:
    """Return a figure's target on this kind of CPU, which has one."""
    found = TARGETS[what][KINDS.index(kind())]
    assert found is not None, what
    return found


@dataclass
class MustReach:
    """The figures of a session: of each the least, with the shape that had it."""

    found: dict[str, tuple[float, str]] = field(default_factory=dict)

    def add(self, what: str, ratio: float, shape: str = "") -> None:
        """Keep a figure of ``TARGETS`` if it is the least so far."""
        assert what in TARGETS, what
        if what not in self.found or ratio < self.found[what][0]:
            self.found[what] = ratio, shape

    def lines(self) -> list[str]:
        """The table of the CPU's kind; nothing without figures."""
        if not self.found:
            return []
        own = kind()
        place = KINDS.index(own)
        rows = [f"must reach, {own}", f"{'what':72} {'measured':>9} {'target':>7}"]
        for what, targets in TARGETS.items():
            target = targets[place]
            value, shape = self.found.get(what, (None, ""))
            shown = "not run" if value is None else f"{value:.2f}x"
            goal = "n/a" if target is None else f"{target:g}x"
            mark = "" if value is None or target is None else "reached" if value >= target else "SHORT"
            rows.append(f"{what:72} {shown:>9} {goal:>7} {mark:7} {shape}".rstrip())
        return rows


MUST_REACH = MustReach()
