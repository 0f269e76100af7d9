"""Gradients added up by processes of one machine: each writes its own to shared memory, and reads the others'.

A piece of all gradients at a time: a process writes its values to the half of its place that is free, waits until all
have, and adds theirs to its own, in the order of ranks. The other half is free again by then: a process that waits has
read all that was written before the last wait. Through sockets the same bytes go into the kernel and out of it twice,
and a thread of the transport takes a tenth of a step on the core that computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from spu.distributed.collectives import summed

__all__ = ["SharedSums", "place_bytes"]

_LARGEST = 2**22
"""Elements that are written between two waits, of a model that has more."""


def place_bytes(elements: int) -> int:
    """Return the size of a process's place, for so many gradients: two halves, fp32."""
    return 2 * 4 * max(1, min(elements, _LARGEST))


class _Part(NamedTuple):
    """Elements of one parameter."""

    parameter: int
    start: int
    stop: int


class SharedSums:
    """Adds up gradients over processes of one machine: `spu.distributed.sums.Sums`.

    Args:
        group: the processes that have the same stages.
        places: theirs, by rank, uint8 [place_bytes(...)]: see `spu.distributed.shared_memory`.
    """

    def __init__(self, group: dist.ProcessGroup, places: Sequence[torch.Tensor]) -> None:
        self._group, self._own = group, group.rank()
        self._halves = list(zip(*(place.view(torch.float32).chunk(2) for place in places), strict=True))
        self._turn = 0  # the half that is free
        self._parameters: list[nn.Parameter] = []
        self._pieces: list[list[_Part]] = []

    def begin(self, stages: dict[int, list[nn.Parameter]], late: Collection[int], backwards: int) -> None:
        """Begin a step; gradients are read at its end, so that it matters to none when they are complete."""
        if not self._pieces:
            self._parameters = [p for own in stages.values() for p in own]
            self._pieces = list(_pieces([p.numel() for p in self._parameters], self._halves[0][0].numel()))

    def backward(
        self, stage: int, parameters: Sequence[nn.Parameter], *, at_once: bool = True
    ) -> AbstractContextManager[None]:
        """Return a context for a backward of a stage: nothing leaves before the end."""
        return nullcontext()

    @torch.no_grad()
    def end(self) -> None:
        """Give every parameter the sum: the same in all processes, to the last bit.

        A parameter that only some of them have used has a gradient in all of them.
        """
        values = [None if p.grad is None else p.grad.reshape(-1) for p in self._parameters]
        for piece in self._pieces:
            half = self._halves[self._turn]
            self._write(piece, values, half[self._own])
            if piece is self._pieces[0]:
                self._fill(values)
            else:
                summed(torch.zeros(1, dtype=torch.float32, device="cpu"), self._group)  # all have written
            self._turn = 1 - self._turn
            self._add(piece, values, half)
        for parameter, value in zip(self._parameters, values, strict=True):
            grad = parameter.grad
            if value is not None and grad is not None and not grad.is_contiguous():  # the value is a copy
                grad.copy_(value.view(grad.shape))

    def cancel(self) -> None:
        """Forget what is on its way: nothing is."""

    def under_way(self) -> bool:
        """Return False: whoever sends waits."""
        return False

    def let_go(self) -> None:
        """Keep the group no more; nothing is added up afterwards."""
        vars(self).pop("_group", None)

    def close(self) -> None:
        """Let go of the places."""
        self._halves.clear()

    def _write(self, piece: Sequence[_Part], values: Sequence[torch.Tensor | None], place: torch.Tensor) -> None:
        own = [(part, values[part.parameter]) for part in piece]
        parts = [
            torch.zeros(p.stop - p.start, dtype=torch.float32, device="cpu") if v is None else v[p.start : p.stop]
            for p, v in own
        ]
        if parts:
            torch.cat(parts, out=place[: sum(map(len, parts))])

    def _fill(self, values: list[torch.Tensor | None]) -> None:
        """Tell which parameters have a gradient, and make one, 0 so far, where only others have; all have written."""
        told = torch.tensor([value is not None for value in values], dtype=torch.float32, device="cpu")
        counts = summed(told, self._group).tolist()
        for index, (parameter, count) in enumerate(zip(self._parameters, counts, strict=True)):
            if count and values[index] is None:
                parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
                parameter.grad = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
                values[index] = parameter.grad.view(-1)

    def _add(self, piece: Sequence[_Part], values: Sequence[torch.Tensor | None], half: Sequence[torch.Tensor]) -> None:
        sizes = [part.stop - part.start for part in piece]
        terms = [place[: sum(sizes)].split(sizes) for place in half]
        if len(half) == 2:  # a + b is b + a
            del terms[self._own]
        for part, *each in zip(piece, *terms, strict=True):
            value = values[part.parameter]
            if value is None:
                continue
            total = value[part.start : part.stop]
            if len(half) > 2:
                total.copy_(each.pop(0))
            for term in each:
                total += term


def _pieces(sizes: Sequence[int], most: int) -> Iterator[list[_Part]]:
    """Yield parts of at most ``most`` elements together, which are those of all parameters; at least one list."""
    piece: list[_Part] = []
    free = most
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + free)
            piece.append(_Part(index, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield piece
                piece, free = [], most
    if piece or not sum(sizes):  # each piece is a wait; without one nobody would hear who has a gradient
        yield piece
