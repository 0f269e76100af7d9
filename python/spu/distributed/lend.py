"""A checkpoint on rank 0's disk, read by processes that do not see it: rank 0 sends the bytes that they ask for.

Each process reads its own disk where that has the same checkpoint as rank 0's, by its manifest's digest: on one
machine, or in a folder that all machines share. An older checkpoint that another machine has at the same path is not
taken. The others ask rank 0, one after the other, for the tensors of their stages; so rank 0 is the one process whose
disk a checkpoint needs, for writing (`spu.distributed.gather`) and for reading.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch

from spu.checkpoint import writing as checkpoint
from spu.checkpoint.reading import DTYPES, NAMES, CheckpointError, Stored, memory
from spu.distributed.job import Job

__all__ = ["load_anywhere"]

T = TypeVar("T")
Opened = Callable[[], AbstractContextManager[tuple[dict[str, Stored], dict[str, Any]]]]

_END, _WAIT, _TURN = 0, 1, 2  # rank 0's words to the others
_DONE = -1  # in the place of an offset
_WORD_S = 10.0  # between two words to processes that wait


def load_anywhere(job: Job, path: str | Path, load: Callable[[Opened], T]) -> T:
    """Return what ``load`` returns, with the checkpoint at ``path`` of rank 0's disk; called in every process.

    Args:
        job: the processes.
        path: the same in all.
        load: is given what opens the checkpoint, as `spu.checkpoint.writing.opened` does.

    Raises:
        CheckpointError: rank 0 has none there, or a damaged one; or as ``load``.
    """
    found = job.gathered(checkpoint.fingerprint(path))
    own = partial(checkpoint.opened, path)
    lacking = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if not lacking:
        return load(own)
    if not found[0]:
        raise CheckpointError(
            f"rank 0 has no checkpoint at {path}, which it reads for all, and rank {lacking[0]} has one: start the "
            "process on the machine that has written it as rank 0, or give a folder that all machines see"
        )
    if job.rank == 0:
        return _lend(job, own, load, lacking)
    told = job.decided(str, "read the checkpoint")
    return _borrow(job, json.loads(told) if job.rank in lacking else None, own, load)


def _lend(job: Job, own: Opened, load: Callable[[Opened], T], lacking: list[int]) -> T:
    opened: list[tuple[dict[str, Stored], dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:

        def describe() -> str:
            opened.append(stack.enter_context(own()))
            tensors, meta = opened[0]
            rows = [[s.name, list(s.shape), NAMES[s.dtype], s.offset] for s in tensors.values()]
            return json.dumps([rows, meta])

        job.decided(describe, "read the checkpoint")
        try:
            result = load(lambda: contextlib.nullcontext(opened[0]))
            for rank in lacking:
                _serve(job, [stored.file for stored in opened[0][0].values()][:1], rank)
        finally:
            _say(job, _END, range(1, job.size))
    return result


def _serve(job: Job, files: list[IO[bytes]], rank: int) -> None:
    """Send a process the parts of the file that it asks for, until it wants no more; no tensors have no file."""
    others, last = [other for other in range(1, job.size) if other != rank], time.monotonic()
    _say(job, _TURN, [rank])
    while (asked := job.receive((2,), torch.int64, rank).tolist())[0] != _DONE:
        piece = torch.empty(asked[1], dtype=torch.uint8, device="cpu")
        file = files[0]
        file.seek(asked[0])
        if file.readinto(memory(piece)) != asked[1]:  # type: ignore[attr-defined]
            raise CheckpointError(f"{file.name} ends before byte {sum(asked)}: it was changed while it was read")
        job.send(piece, rank)
        if time.monotonic() - last > _WORD_S:  # who waits gives up on who says nothing for long
            _say(job, _WAIT, others)
            last = time.monotonic()


def _say(job: Job, word: int, ranks: Any) -> None:
    for rank in ranks:
        job.send(torch.tensor([word], device="cpu"), rank)


def _borrow(job: Job, told: Any, own: Opened, load: Callable[[Opened], T]) -> T:
    """Load from this process's own disk, or what rank 0 has told of, when it is this process's turn."""
    results: list[T] = []
    failures: list[Exception] = []

    def attempt(opened: Opened) -> None:
        try:
            results.append(load(opened))
        except Exception as error:  # raised when rank 0 has said its last word: the next talk begins with a new one
            failures.append(error)

    if told is None:
        attempt(own)
    while (word := int(job.receive((1,), torch.int64, 0))) != _END:
        if word == _TURN:
            attempt(lambda: contextlib.nullcontext(_described(job, *told)))
            job.send(torch.tensor([_DONE, 0], device="cpu"), 0)
    if failures:
        raise failures[0]
    if not results:
        raise CheckpointError("rank 0 reads the checkpoint for this process, and has failed: its output says why")
    return results[0]


def _described(job: Job, rows: list[Any], meta: dict[str, Any]) -> tuple[dict[str, Stored], dict[str, Any]]:
    file = cast(IO[bytes], _FarFile(job))
    return {name: Stored(name, torch.Size(shape), DTYPES[kind], file, at) for name, shape, kind, at in rows}, meta


class _FarFile:
    """Rank 0's file of tensors, as `spu.checkpoint.reading.Stored` reads one."""

    name = "rank 0's checkpoint"

    def __init__(self, job: Job) -> None:
        self._job, self._at = job, 0

    def seek(self, offset: int) -> None:
        self._at = offset

    def readinto(self, piece: memoryview) -> int:
        self._job.send(torch.tensor([self._at, len(piece)], device="cpu"), 0)
        received = self._job.receive((len(piece),), torch.uint8, 0)
        piece[:] = memory(received)
        self._at += len(piece)
        return len(piece)
