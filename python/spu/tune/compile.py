"""Compile the configurations that ``spu tune`` is going to time, in other processes, ahead of the measurement.

Otherwise the GPU waits for the compiler: seconds a configuration on one core, against milliseconds of measuring. The
result goes to Triton's own cache on disk, where the launch of the same kernel finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch

from spu.common.dtypes import DTYPES
from spu.common.torch_private import TorchDispatchMode
from spu.tune.calls import REPRESENTATIVE, call_of, candidates

__all__ = ["Compiling", "Row", "WithoutProducts", "compile_row"]

Row = tuple[str, str, str]  # op, dtype, shape class


class WithoutProducts(TorchDispatchMode):
    """Matrix products by torch take no time, and make no values: only the launches around them are asked for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm):
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        first = 0 if func.overloadpacket is torch.ops.aten.mm else 1
        a, b, *rest = args[first:]
        dtype = next((value for value in rest if isinstance(value, torch.dtype)), a.dtype)
        return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def compile_row(row: Row, arch: int, processors: int, index: int) -> int:
    """Compile candidate ``index`` of a row for a GPU of ``arch`` (80 is sm_80) with so many multiprocessors; return the
    number of kernels.
    """
    from spu.kernels import ahead

    op, dtype, shape_class = row
    torch.set_num_threads(1)
    config = candidates(op, DTYPES[dtype], shape_class, arch)[index]
    if config.algorithm > 0:  # launches what the first one does
        return 0
    with ahead.recording(arch, processors) as launches, WithoutProducts():
        call_of(op, DTYPES[dtype], REPRESENTATIVE[shape_class], torch.device("cpu"))(config)
    for launch in launches:
        ahead.build(launch, arch, listing=False)
    return len(launches)


class Compiling:
    """The compilations of some rows, in order; leave the ``with`` block to give up those that have not begun.

    Args:
        rows: (op, dtype, shape class) each.
        arch: 80 for sm_80.
        processors: the GPU's multiprocessors: some kernels are specialised by shares of the work.
        jobs: processes; by default one a core, at most 16.
    """

    def __init__(self, rows: Iterable[Row], arch: int, processors: int, jobs: int | None = None) -> None:
        self._pool = ProcessPoolExecutor(jobs or min(os.cpu_count() or 1, 16), mp_context=get_context("spawn"))
        self._running: dict[Row, list[Future[int]]] = {}
        for row in rows:
            indices = range(len(candidates(row[0], DTYPES[row[1]], row[2], arch)))
            self._running[row] = [self._pool.submit(compile_row, row, arch, processors, index) for index in indices]

    def wait(self, row: Row) -> None:
        """Wait until a row's candidates are compiled. A failed one will fail, and be reported, when it is measured."""
        for future in self._running.pop(row, []):
            future.exception()

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
