"""Forms in which gradients cross between pipelines: fp32, or rounded to fp16 for half of the bytes.

Rounded, each process owns a part of a bucket. It gets that part of every process's gradients as fp16, adds them in
fp32, in the order of ranks, rounds the sum once and sends it to all. So an element is rounded n + 1 times in all, each
time by at most 2^-11 of itself, however many processes there are. What travels in one piece has a power of two as its
factor, which brings its largest value close to fp16's end: nothing finite overflows, and values down to 2^-29 of the
largest keep fp16's precision (below, an error of 2^-40 of the largest). inf and NaN arrive as such, in the sum too, and
may take others of their piece with them.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

__all__ = ["WIRES", "Rounded", "Sending", "Whole"]

_HEAD = 16  # bytes, the first four of which are the factor
_EACH = 8  # parts are multiples of so many elements, so that each begins at a multiple of 16 bytes
_MOST = 120  # powers of two, whose inverse is a normal number too


class Sending(Protocol):
    """A bucket on its way."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Send fp32 values of one dimension, which belong to this object from now on."""

    def done(self) -> bool:
        """Tell whether what was sent so far has come, or failed."""

    def half_way(self) -> None:
        """Send what can be sent only when the others' values are here; called in every process, in one order."""

    def sum(self) -> torch.Tensor:
        """Return the sum, fp32, the same in every process."""


class Whole:
    """A sum in fp32, by one all-reduce."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._flat = flat
        self._work = dist.all_reduce(flat, group=group, async_op=True)

    def done(self) -> bool:
        """Tell whether the all-reduce has ended."""
        return bool(self._work.is_completed())

    def half_way(self) -> None:
        """Do nothing."""

    def sum(self) -> torch.Tensor:
        """Return the sum."""
        self._work.wait()
        return self._flat


class Rounded:
    """A sum of values that are rounded to fp16, as described above."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._group, self._count = group, flat.numel()
        parts = group.size()
        self._each = max(1, -(-flat.numel() // (parts * _EACH))) * _EACH  # a part of nothing has no largest value
        rows = F.pad(flat, (0, parts * self._each - flat.numel())).view(parts, self._each)
        self._sent = _rounded(rows)
        self._got = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(self._got, self._sent, group=group, async_op=True)

    def done(self) -> bool:
        """Tell whether what was sent last has come."""
        return bool(self._work.is_completed())

    def half_way(self) -> None:
        """Add up this process's part and send it."""
        self._work.wait()
        total = torch.zeros(self._each, device=self._got.device, dtype=torch.float32)
        for row in _restored(self._got):
            total += row
        self._sent = _rounded(total[None])
        self._work = dist.all_gather(list(self._got), self._sent[0], group=self._group, async_op=True)

    def sum(self) -> torch.Tensor:
        """Return the sum; before :meth:`half_way` nothing of use."""
        self._work.wait()
        return _restored(self._got).reshape(-1)[: self._count]


WIRES: dict[str, type[Sending]] = {"fp32": Whole, "fp16": Rounded}
"""By the name that users give."""


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """Return fp32 [n, k] as bytes [n, 16 + 2 k]: each row's factor, and its values times that in fp16."""
    largest = rows.abs().amax(1)
    power = (15 - torch.frexp(largest).exponent).clamp(-_MOST, _MOST)  # largest < 2^exponent
    power = torch.where(largest.isfinite(), power, 0)
    factor = torch.ldexp(torch.ones_like(largest), power)
    wire = torch.zeros(len(rows), _HEAD + 2 * rows.shape[1], dtype=torch.uint8, device=rows.device)
    wire[:, :4] = factor.view(-1, 1).view(torch.uint8)
    wire[:, _HEAD:].view(torch.float16).copy_(rows * factor[:, None])
    return wire


def _restored(wire: torch.Tensor) -> torch.Tensor:
    """Return the values of :func:`_rounded`, fp32."""
    factor = wire[:, :4].contiguous().view(torch.float32)
    return wire[:, _HEAD:].view(torch.float16).to(torch.float32) * factor.reciprocal()
