"""How fast the processes' links are: measured over the process group that trainings use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from spu.distributed.job import Job

__all__ = ["RankLink", "every_pair", "measure_links"]

_SMALL, _LARGE, _MOST = 1, 1 << 20, 1 << 24  # bytes of a message
_TURNS, _LARGE_TURNS = 20, 3
_ENOUGH_S = 0.02
_ALL_PAIRS = 8


@dataclass(frozen=True)
class RankLink:
    """The link from one process to another.

    Attributes:
        source, target: ranks.
        bytes_per_s: of large messages.
        latency_s: half of a round trip of one byte.
    """

    source: int
    target: int
    bytes_per_s: float
    latency_s: float


def every_pair(size: int) -> list[tuple[int, int]]:
    """Return the pairs of up to eight processes, each once; of more, those of neighbours in a ring."""
    if size <= _ALL_PAIRS:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    return [(k, (k + 1) % size) for k in range(size)]


def measure_links(job: Job, pairs: Sequence[tuple[int, int]]) -> list[RankLink]:
    """Return both directions of the links of these pairs, one pair after the other; called in every process.

    A large message is answered by one byte, whose way is taken off. It begins with a megabyte, and grows as long as it
    takes less than 20 ms.
    """
    found: list[RankLink] = []
    for a, b in pairs:
        dist.barrier()
        if job.rank in (a, b):
            other = b if job.rank == a else a
            latency = statistics.median(_turn(job, a, other, _SMALL, _SMALL, _TURNS)) / 2
            for source, target in ((a, b), (b, a)):
                seconds, size = 0.0, _LARGE
                while True:
                    seconds = statistics.median(_turn(job, source, other, size, _SMALL, _LARGE_TURNS))
                    # The source's clock decides for both.
                    told = _told(job, seconds, source, other)
                    if told >= _ENOUGH_S or size >= _MOST:
                        break
                    size *= 4
                rate = size / max(seconds - latency, 1e-9)
                if job.rank == source:
                    found.append(RankLink(source, target, rate, latency))
    return sorted((link for own in job.gathered(found) for link in own), key=lambda link: (link.source, link.target))


def _turn(job: Job, source: int, other: int, there: int, back: int, turns: int) -> list[float]:
    """Return the seconds of some round trips; an unmeasured one comes first."""
    question, answer = (torch.zeros(size, dtype=torch.uint8, device="cpu") for size in (there, back))
    taken = []
    for _ in range(turns + 1):
        begin = time.perf_counter()
        if job.rank == source:
            job.send(question, other)
            job.receive((back,), torch.uint8, other)
        else:
            job.receive((there,), torch.uint8, other)
            job.send(answer, other)
        taken.append(time.perf_counter() - begin)
    return taken[1:]


def _told(job: Job, seconds: float, source: int, other: int) -> float:
    if job.rank == source:
        job.send(torch.tensor([seconds], dtype=torch.float64, device="cpu"), other)
        return seconds
    return float(job.receive((1,), torch.float64, other))
