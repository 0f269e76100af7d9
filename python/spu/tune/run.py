"""``spu tune``: measure the kernels' configurations on this GPU and keep the best in the user's own table.

For every product, dtype and shape class the derived configurations and their neighbours are timed on one representative
shape, beside cuBLAS with our epilogue and cuBLASLt with its own; the fastest goes into ``spu.kernels.table.user_path``
with the device, versions and date. After the products of a layer, where another backend serves the GPU as well (CUDA
C++), the whole layer is timed on each, forward and backward with these configurations, and the faster one is named;
CUDA C++ chooses among its own tiles and cuBLASLt first (``tiles.py``). The table is written after every row, so that a
run that is cut off keeps what it has measured, and a later run goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from spu import __version__
from spu.common.dtypes import DTYPES
from spu.common.errors import kind_and_line
from spu.kernels import table
from spu.kernels.config import CLASSES, PRODUCTS, Entry, Table, arch_name
from spu.tune.backends import LAYERS, layer_of
from spu.tune.calls import REPRESENTATIVE, call_of, candidates
from spu.tune.compile import Compiling, Row
from spu.tune.tiles import choose_tiles
from spu.tune.timing import context_is_gone, measure_us

__all__ = ["REPRESENTATIVE", "candidates", "plan_lines", "tune"]


def _rows(ops: tuple[str, ...], dtypes: tuple[str, ...], classes: tuple[str, ...] = CLASSES) -> Iterator[Row]:
    """Yield the rows in the order of measuring: the products of a layer of one shape class follow each other, so that
    its backend can be named before the next, and the layers that most time is spent in come first.
    """
    alone = [op for op in ops if not any(op in parts for parts in LAYERS.values())]
    for dtype in dtypes:
        for parts in (*LAYERS.values(), *((op,) for op in alone)):
            for shape_class in classes:
                for op in parts:
                    if op in ops:
                        yield op, dtype, shape_class


def plan_lines(
    arch: int,
    ops: tuple[str, ...] = PRODUCTS,
    dtypes: tuple[str, ...] = ("fp16", "bf16"),
    classes: tuple[str, ...] = CLASSES,
) -> list[str]:
    """Return the list of what a run would measure, a line a row; measure nothing."""
    lines = []
    for op, dtype, shape_class in _rows(ops, dtypes, classes):
        count = len(candidates(op, DTYPES[dtype], shape_class, arch))
        m, n, k = REPRESENTATIVE[shape_class]
        lines.append(f"{op}/{dtype}/{shape_class}: {count} configurations at {m} x {n} x {k}")
    return lines


def _best(op: str, dtype: str, shape_class: str, device: torch.device, arch: int) -> tuple[Entry, list[str]]:
    """Return the fastest configuration of a row and the errors of those that failed."""
    call, best, notes = call_of(op, DTYPES[dtype], REPRESENTATIVE[shape_class], device), None, []
    for config in candidates(op, DTYPES[dtype], shape_class, arch):
        try:
            took = measure_us(lambda config=config: call(config), device)  # type: ignore[misc]
        except Exception as error:  # a configuration that does not fit is no candidate; anything else is said
            if context_is_gone(error, device):
                raise
            notes.append(f"  {config}: {kind_and_line(error)}")
            continue
        if best is None or best.time_us is None or took < best.time_us:
            best = Entry(config, "triton", took)
    assert best is not None, f"no configuration of {op} {dtype} {shape_class} ran: {notes}"
    return best, notes


def _facts(device: torch.device) -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "spu": __version__,
        "date": datetime.date.today().isoformat(),
    }


def tune(
    device: str = "cuda:0",
    ops: tuple[str, ...] = PRODUCTS,
    dtypes: tuple[str, ...] = ("fp16", "bf16"),
    *,
    classes: tuple[str, ...] = CLASSES,
    out: Path | None = None,
    seconds: float | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure, and write the user's table; return its path.

    Args:
        device: which GPU.
        ops: of ``spu.kernels.config.PRODUCTS``.
        dtypes: of fp16, bf16, fp32.
        classes: of shapes, of ``spu.kernels.config.CLASSES``, in the order of measuring.
        out: another file than the user's table.
        seconds: stop after this time, between two rows.
        jobs: processes that compile ahead of the measurement; by default one a core, at most 16.
        say: takes a line for every row.

    Raises:
        ValueError: without a CUDA device, or for an unknown op or dtype.
    """
    unknown = [name for name in ops if name not in PRODUCTS] + [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown {unknown}: ops are {', '.join(PRODUCTS)}, dtypes {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise ValueError("spu tune measures a CUDA device and torch sees none: see `spu doctor`")
    where = torch.device(device)
    capability = torch.cuda.get_device_capability(where)
    name, facts, arch = arch_name(capability), _facts(where), 10 * capability[0] + capability[1]
    processors = torch.cuda.get_device_properties(where).multi_processor_count
    path = out or table.user_path(name)
    run = _Run(path, Table(name, "measured", dict(_kept(path, facts)), facts), say)
    began = time.monotonic()

    def late() -> bool:
        over = seconds is not None and time.monotonic() - began > seconds
        if over:
            say(f"stopped after {seconds:.0f} s; run again to go on")
        return over

    rows = list(_rows(ops, dtypes, classes))
    wanted = [row for row in rows if not run.has(row)]
    with torch.cuda.device(where), Compiling(wanted, arch, processors, jobs) as compiling:
        for place, row in enumerate(rows):
            if late():
                return path
            if row in wanted:
                compiling.wait(row)
                run.keep(row, *_best(*row, where, arch))
            if place + 1 == len(rows) or layer_name(rows[place + 1]) != layer_name(row):
                run.choose_backend(layer_name(row), where)
    forget_tables()
    return path


def layer_name(row: Row) -> Row:
    """Return the row that holds the backend of a row's layer: the row itself where its op belongs to none."""
    op = next((name for name, parts in LAYERS.items() if row[0] in parts), row[0])
    return (op, *row[1:])


class _Run:
    """The table that is being made: every change is written at once."""

    def __init__(self, path: Path, made: Table, say: Callable[[str], None]) -> None:
        self._path, self._table, self._say = path, made, say
        self._entries = dict(made.entries)

    def has(self, row: Row) -> bool:
        entry = self._entries.get("/".join(row))
        return entry is not None and entry.time_us is not None

    def keep(self, row: Row, entry: Entry, notes: list[str]) -> None:
        key, config = "/".join(row), entry.config
        self._entries[key] = entry
        self._write()
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        tile = f"algorithm {config.algorithm}" if config.kind == "cublaslt" else tile
        self._say(f"{key}: {entry.time_us:.1f} us with {config.kind} {tile}")
        for note in notes:
            self._say(note)

    def choose_backend(self, row: Row, device: torch.device) -> None:
        """Time a row's whole layer on every backend that serves the GPU, if there is more than one."""
        from spu.ops.dispatch import cuda_candidates

        op, dtype, shape_class = row
        if op not in LAYERS:
            return
        names, key = cuda_candidates(DTYPES[dtype]), "/".join(row)
        entry = self._entries.get(key)
        if entry is None or len(names) < 2 or set(entry.layer_us) >= set(names):
            return
        configs = {o: self._entries[f"{o}/{dtype}/{shape_class}"].config for o in LAYERS[op] if self.has((o, *row[1:]))}
        if set(configs) != set(LAYERS[op]):
            return
        shape, times = REPRESENTATIVE[shape_class], dict[str, float]()
        if op == "linear" and "cuda" in names:
            tiles_path = self._path.with_name(f"cuda_{self._path.name}")
            module = importlib.import_module("spu._cuda")
            choose_tiles(module, tiles_path, dtype, shape_class, device, self._table.facts, self._say)
        for name in names:
            call = layer_of(op, name, DTYPES[dtype], shape, device, configs)
            try:
                times[name] = measure_us(call, device)
            except Exception as error:
                if context_is_gone(error, device):
                    raise
                self._say(f"  {name}: {kind_and_line(error)}")
                times[name] = float("inf")
        best = min(times, key=lambda name: times[name])
        self._entries[key] = dataclasses.replace(entry, backend=best, layer_us=times)
        self._write()
        self._say(f"{key}: forward and backward {', '.join(f'{n} {us:.0f} us' for n, us in times.items())}: {best}")

    def _write(self) -> None:
        table.write(dataclasses.replace(self._table, entries=self._entries), self._path)


def forget_tables() -> None:
    """Make kernels and dispatch read the tables from disk at the next call."""
    from spu.ops.dispatch import select_cuda

    table.forget()
    select_cuda.cache_clear()


def _kept(path: Path, facts: dict[str, str]) -> dict[str, Entry]:
    """Return the rows of an earlier run on the same device with the same versions."""
    if not path.is_file():
        return {}
    earlier = table.read(path)
    same = all(earlier.facts.get(key) == facts[key] for key in ("device", "torch", "triton", "spu"))
    return dict(earlier.entries) if same else {}
