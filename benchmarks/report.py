"""The closing table of a benchmark run, and the roofline picture: each kernel a point under the machine's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measured row: seconds a call (``median``) for ``flops`` operations or ``bytes`` read and written."""

    what: str
    shape: str
    peer: str
    median: float
    flops: float
    bytes: float
    ceiling: float | None
    targets: dict[str, float] = field(default_factory=dict)
    intensity: float = 0.0  # operations a byte; 0: unknown, not drawn
    paired: dict[str, float] = field(default_factory=dict)  # ratios to peers that ran in turns with it

    @property
    def rate(self) -> float:
        return (self.flops or self.bytes) / self.median

    @property
    def share(self) -> float | None:
        """Of the ceiling that was measured beside it."""
        return self.rate / self.ceiling if self.ceiling else None

    @property
    def ours(self) -> bool:
        return self.peer.startswith("spu")


def _peers(figure: Figure, group: Iterable[Figure]) -> dict[str, float]:
    """How many times faster than each peer: as measured in turns, else by rate, as a slow peer may do a part only."""
    return {other.peer: figure.rate / other.rate for other in group if not other.ours} | figure.paired


def beside_torch(figures: Iterable[Figure]) -> list[tuple[float, str]]:
    """How many times faster than torch each of our ops was, as measured in turns, and which op and shape it is."""
    return [
        (ratio, f"{figure.what} {figure.shape} {figure.peer}, {name}")
        for figure in figures
        for name, ratio in figure.paired.items()
        if figure.ours and name.startswith("torch")
    ]


def _judged(name: str, value: float, target: float | None, text: str) -> str:
    if target is None:
        return f"{text} {name}"
    return f"{text} {name} (target {target:g}x: {'reached' if value >= target else 'MISSED'})"


def table(figures: list[Figure]) -> list[str]:
    """One line a figure: time, rate, share of its ceiling and ratio to each peer, with targets beside."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.what, figure.shape), []).append(figure)
    lines = []
    for group in groups.values():
        for f in group:
            unit = "GFLOP/s" if f.flops else "GB/s   "
            share = "   -" if f.share is None else f"{100 * f.share:3.0f}%"
            goal = f.targets.get("ceiling")
            if f.ours and goal is not None and f.share is not None:
                share += f" (target {100 * goal:.0f}%: {'reached' if f.share >= goal else 'MISSED'})"
            beside = ""
            if f.ours:
                ratios = _peers(f, group)
                beside = "  ".join(_judged(n, r, f.targets.get(n), f"{r:.2f}x") for n, r in ratios.items())
            lines.append(
                f"{f.what:22} {f.shape:20} {f.peer:18} {1e3 * f.median:9.3f} ms {f.rate / 1e9:7.1f} {unit} "
                f"{share}  {beside}".rstrip()
            )
    return lines + summary(groups.values())


def summary(groups: Iterable[list[Figure]]) -> list[str]:
    """The spread of a dtype's linear products against torch fp32: the least and the median ratio."""
    ratios: dict[str, list[float]] = {}
    for group in groups:
        for figure in group:
            if figure.ours and figure.flops and "torch fp32" in _peers(figure, group):
                ratios.setdefault(figure.peer, []).append(_peers(figure, group)["torch fp32"])
    return [
        f"{peer} against torch fp32 over {len(values)} products: least {min(values):.2f}x, median "
        f"{statistics.median(values):.2f}x (targets 1x and 1.5x)"
        for peer, values in ratios.items()
    ]


def roofline(figures: list[Figure], fma: float, copy: float, path: Path) -> None:
    """Draws our kernels under the two ceilings: operations a second over operations a byte, both axes logarithmic.

    Williams, Waterman and Patterson, "Roofline" (2009). A point's height is its share of the ceiling that was measured
    beside it, times the ceilings drawn here: the machine's clock may have been another.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def roof(intensity: float) -> float:
        return min(fma, copy * intensity) / 1e9

    points = [f for f in figures if f.ours and f.share is not None and f.intensity > 0]
    figure, axis = pyplot.subplots(figsize=(9, 6))
    corners = [0.02, fma / copy, 4000.0]
    axis.plot(corners, [roof(x) for x in corners], color="black", linewidth=1)
    axis.text(corners[1], roof(corners[1]) * 1.1, f"{fma / 1e9:.0f} GFLOP/s", fontsize=8)
    axis.text(corners[0], roof(corners[0] * 2), f"{copy / 1e9:.0f} GB/s", fontsize=8)
    for what in dict.fromkeys(f.what for f in points):
        chosen = [f for f in points if f.what == what]
        heights = [(f.share or 0) * (fma / 1e9 if f.flops else copy * f.intensity / 1e9) for f in chosen]
        axis.plot([f.intensity for f in chosen], heights, "o", markersize=4, label=what)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte (operands and results once)", ylabel="GFLOP/s")
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
