"""Run a test's function in several processes that form a process group over gloo, as torchrun would start them.

The processes are forked from a server that has imported torch and spu already, so that a job starts in a fraction of a
second. None outlives its test.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["in_ranks"]

_WAIT_S = 150  # a busy machine takes its time to import
# By the server, before the forks: also what a training run imports on its way, most of its time.
_IMPORTED = [
    "torch", "torch.distributed.pipelining", "torch._dynamo.config", "spu", "spu.trainer.trainer", "spu.train.loop",
    "spu.train.results", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "peft", "matplotlib.pyplot", "matplotlib.backends.backend_agg",
]  # fmt: skip


def in_ranks(count: int, work: Callable[..., Any], *args: Any, timeout_s: int = 60, grouped: bool = True) -> list[Any]:
    """Return what ``work(*args)`` returns in each of ``count`` processes, by rank.

    Args:
        work: a function of a module, with results that can be pickled; one thread for torch.
        timeout_s: of the process group.
        grouped: make the group before ``work``; else it finds the environment that torchrun leaves.

    Raises:
        AssertionError: one failed, with its traceback; or did not end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_run, args=(rank, count, store, pipe[1], timeout_s, grouped, work, args))
            for rank, pipe in enumerate(pipes)
        ]
        try:
            for process in processes:
                process.start()
            for _, end in pipes:
                end.close()
            return _results([pipe[0] for pipe in pipes])
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = time.monotonic() + _WAIT_S
    left = dict(enumerate(pipes))
    while left and time.monotonic() < end:
        for pipe in wait(list(left.values()), timeout=1.0):
            rank = next(rank for rank, own in left.items() if own is pipe)
            del left[rank]
            try:
                good, value = pipes[rank].recv()
            except EOFError:
                good, value = False, "it ended without a word"
            (results if good else failures)[rank] = value
    if left:
        failures |= dict.fromkeys(left, f"still running after {_WAIT_S} s")
    assert not failures, "\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items())
    return [results[rank] for rank in range(len(pipes))]


def _run(
    rank: int, count: int, store: str, pipe: Connection, timeout_s: int, grouped: bool, work: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    try:
        if grouped:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout_s)
            )
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
