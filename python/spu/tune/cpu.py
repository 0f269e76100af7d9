"""``spu tune`` on a CPU: for every product, dtype and class of shapes, whose kernels serve.

Each way that this processor has (``spu.ops.cpu_table``) is timed beside our own kernels on one shape of the class, the
two in turns, so that what else runs on the machine falls on both. A way is taken only where it is clearly faster: by
``MARGIN`` in the median of the pairs and in the best of each, and once more when it is asked again.
"""

from __future__ import annotations

import datetime
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from spu import __version__
from spu.common.dtypes import DTYPES
from spu.ops import cpu_table, schema
from spu.ops.cpu_table import CLASSES, OPS, CpuTable
from spu.ops.dispatch import status_of

__all__ = ["MARGIN", "SHAPES", "call_of", "compare", "plan_lines", "shape_of", "tune", "ways_of"]

MARGIN = 1.05
# rows, columns and inner of the product that stands for its class; of linear_dw rows and columns are the weight's
SHAPES = {
    "row": (2, 1024, 1024),
    "skinny": (32, 2048, 1024),
    "few": (128, 704, 512),
    "small": (256, 512, 704),
    "deep": (512, 1024, 4096),
    "large": (512, 2048, 1024),
}
_NARROWER = {"amx": ("avx512bf16", "avx512"), "avx512bf16": ("avx512",)}
_SECONDS, _LEAST_PAIRS, _MOST_PAIRS = 0.5, 5, 100  # of a row and way


def shape_of(op: str, shape_class: str) -> tuple[int, int, int]:
    """Return rows, columns and inner of the product of an op that stands for a class."""
    rows, columns, inner = SHAPES[shape_class]
    return (columns, inner, rows) if (op, shape_class) == ("linear_dw", "few") else (rows, columns, inner)


def ways_of(op: str, dtype: str, shape_class: str, isa: str) -> list[str]:
    """Return the ways to compare with our kernels of the instruction set in use."""
    narrower = list(_NARROWER.get(isa, ())) if dtype != "fp32" else []
    takes_torch = op == "linear_dx" or (shape_class != "row" and op != "linear_ce")
    return [*narrower, *(["torch"] if takes_torch and torch.backends.mkl.is_available() else [])]


def _rows(ops: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    return ((op, dtype, shape) for dtype in dtypes for shape in CLASSES for op in ops)


def plan_lines(ops: tuple[str, ...], dtypes: tuple[str, ...], isa: str) -> list[str]:
    """Return the list of what a run would measure, a line a row; measure nothing."""
    return [
        f"{op}/{dtype}/{shape}: {', '.join(ways)} beside {isa} at {' x '.join(map(str, shape_of(op, shape)))}"
        for op, dtype, shape in _rows(ops, dtypes)
        if (ways := ways_of(op, dtype, shape, isa))
    ]


def call_of(op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Callable[[], object]:
    """Return an op as the layers of a decoder call it: no bias, and what costs most of the rest."""
    m, n, k = shape

    def random(*size: int) -> Tensor:
        return (torch.randn(size) / size[-1] ** 0.5).to(dtype)

    run = schema.overload(op if op != "linear_dw" else "linear_dw_", "cpu")
    if op == "linear":
        x, w = random(m, k), random(n, k)
        return lambda: run(x, w, None, "none", False)
    if op == "linear_dx":
        dz, w = random(m, k), random(k, n)
        return lambda: run(dz, w)
    if op == "linear_dw":
        dz, x, main, one, found = random(k, m), random(k, n), torch.zeros(m, n), torch.ones(1), torch.zeros(1)
        return lambda: run(dz, x, main, one, found, True)
    if op == "gated_linear":
        x, gate, up = random(m, k), random(n, k), random(n, k)
        return lambda: run(x, gate, up, "silu", True)
    if op == "gated_dx":
        dgate, dup, gate, up = random(m, k), random(m, k), random(k, n), random(k, n)
        return lambda: run(dgate, dup, gate, up)
    hidden, w, target = random(m, k), random(n, k), torch.randint(0, n, (m,))
    return lambda: run(hidden, w, target, -100)


def compare(ours: Callable[[], object], other: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return how many times faster ``other`` is than ``ours``: the smaller of the median over pairs of calls in turns
    and the ratio of the best calls.
    """

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    once = seconds(ours) + seconds(other)  # warms up
    pairs = max(_LEAST_PAIRS, min(_MOST_PAIRS, int(_SECONDS / max(once, 1e-6))))
    took = [(seconds(ours), seconds(other)) for _ in range(pairs)]
    best = min(a for a, _ in took) / min(b for _, b in took)
    return min(statistics.median(a / b for a, b in took), best)


def _faster(op: str, dtype: str, shape_class: str, isa: str) -> tuple[str, float]:
    """Return the way of a row and how many times faster than our kernels it is ("" and 1 where none is)."""
    set_way = importlib.import_module("spu._C").set_way
    run, key = call_of(op, DTYPES[dtype], shape_of(op, shape_class)), (op, dtype, shape_class)

    def by(way: str) -> Callable[[], object]:
        def call() -> object:
            set_way(*key, way)
            return run()

        return call

    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time  # which other programs disturb less
    found = {way: compare(by(""), by(way), clock) for way in ways_of(*key, isa) if set_way(*key, way)}
    best = max(found, key=lambda way: found[way], default="")
    if not best or found[best] < MARGIN:
        return "", 1.0
    gain = min(found[best], compare(by(""), by(best), clock))  # once more: of many ways by chance one looks faster
    return (best, gain) if gain >= MARGIN else ("", 1.0)


def tune(
    ops: tuple[str, ...] = OPS,
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32"),
    *,
    out: Path | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure with torch's threads, and write the user's table, which this process then uses; return its path.

    Args:
        ops: of ``spu.ops.cpu_table.OPS``.
        dtypes: of fp16, bf16, fp32.
        out: another file than the user's table.
        seconds: stop after this time, between two rows.
        say: takes a line for every row whose way has changed.

    Raises:
        ValueError: where the C++ kernels do not run or the system does not name the processor; for an unknown op or
            dtype.
    """
    unknown = [name for name in ops if name not in OPS] + [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown {unknown}: a CPU's products are {', '.join(OPS)}, dtypes {', '.join(DTYPES)}")
    status = status_of("cpu")
    if not status.available:
        raise ValueError(f"spu tune measures the C++ kernels, which do not run: {status.reason}. Fix: {status.fix}")
    isa = importlib.import_module("spu._C").isa()
    name = cpu_table.family(isa)
    if name is None:
        raise ValueError("spu tune names a CPU's table by /proc/cpuinfo, which does not name this processor")
    before = {key: way for table in cpu_table.tables(name) for key, way in table.ways.items()}
    facts = {
        "device": cpu_table.processor_name(), "threads": str(torch.get_num_threads()), "torch": torch.__version__,
        "spu": __version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    ways: dict[str, str] = {}
    gains: dict[str, float] = {}
    path, began = out or cpu_table.user_path(name), time.monotonic()
    try:
        for row in _rows(ops, dtypes):
            if seconds is not None and time.monotonic() - began > seconds:
                say(f"stopped after {seconds:.0f} s")
                break
            key = "/".join(row)
            ways[key], gain = _faster(*row, isa)
            if ways[key]:
                gains[key] = gain
            if ways[key] != before.get(key, ""):
                say(f"{key}: {ways[key] or isa}, was {before.get(key, '') or isa} ({gain:.2f}x our {isa} kernels)")
        earlier = _earlier(path, name, facts)
        kept = {key: gain for key, gain in earlier.gains.items() if key not in ways}
        cpu_table.write(CpuTable(name, {**earlier.ways, **ways}, facts, {**kept, **gains}), path)
    finally:
        cpu_table.install(cpu_table.tables(name))
    return path


def _earlier(path: Path, name: str, facts: dict[str, str]) -> CpuTable:
    """Return the table of an earlier run on this processor with these threads and versions; else an empty one."""
    found = cpu_table.read(path) if path.is_file() else CpuTable(name, {})
    same = found.family == name and all(found.facts.get(key) == facts[key] for key in facts if key != "date")
    return found if same else CpuTable(name, {})
