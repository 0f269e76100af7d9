"""A slab: one mapping of exactly the asked size, page-locked for a card as far as the system allows."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spu.common.units import format_bytes
from spu.memory.mapped import Mapped
from spu.memory.store import ALIGNMENT, StoreError

__all__ = ["Pinning", "Slab", "aligned", "cuda_pinning", "grouped"]

STEP_BYTES = 256 << 20
"""Bytes that are page-locked at a time: few calls, and a limit is met after most of what it allows is locked."""

SPARE_BYTES = 64 << 20
"""Bytes that can still be page-locked where a slab met the limit: for small buffers, batches, and what crosses links.
WSL 2 has such a limit, of half of the memory or 1 GB, and torch has no other way for them."""


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Return ``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def grouped(sizes: Sequence[int], step: int | None = None) -> list[int]:
    """Return the sizes of runs of neighbours of at least ``step`` bytes each, but for the last; none is cut in two.

    The default step is `STEP_BYTES`.
    """
    step = STEP_BYTES if step is None else step
    groups: list[int] = []
    for size in sizes:
        if groups and groups[-1] < step:
            groups[-1] += size
        else:
            groups.append(size)
    return groups


@dataclass(frozen=True)
class Pinning:
    """How memory is page-locked, so that a card copies from it by itself.

    Attributes:
        register: takes an address and a number of bytes; returns "" if they are page-locked now, else the reason.
        unregister: takes the address.
    """

    register: Callable[[int, int], str]
    unregister: Callable[[int], None]


_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for all cards. Without it the memory is pageable to every card but the one that
was current, whose copies then make the host wait."""


def cuda_pinning(device: torch.device) -> Pinning:
    """Return how CUDA's driver page-locks memory, for all cards; ``device`` is the one that does it, the only one that
    this process need have a context on."""
    cudart = torch.cuda.cudart()

    def register(address: int, size: int) -> str:
        with torch.cuda.device(device):
            code = cudart.cudaHostRegister(address, size, _PORTABLE)
            if int(code) == 0:
                return ""
            # The runtime remembers the failure, and torch would report it at its next launch, whatever that is.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device, dtype=torch.float32)
            return str(cudart.cudaGetErrorString(code))

    def unregister(address: int) -> None:
        with torch.cuda.device(device):
            cudart.cudaHostUnregister(address)

    return Pinning(register, unregister)


class Slab:
    """Memory of its own: zeros at first, private to the process, aligned, outside of every allocator.

    torch's allocator of page-locked memory rounds up to powers of two and keeps what is freed. A slab has the asked
    size to a page, and `close` gives all of it back.

    Args:
        size: in bytes; rounded up to a multiple of `ALIGNMENT`.
        pinning: how to page-lock it; None leaves it pageable.
        steps: bytes that are page-locked at a time, in order; default: all at once. A copy must not touch two steps:
            the driver refuses a copy from two registrations. So no slot may lie across their border.

    Attributes:
        size: in bytes, rounded.
        pinned_bytes: from the start of the slab, page-locked.
        note: why not all of it is page-locked; "" otherwise.

    Raises:
        StoreError: the system does not give so much memory.
    """

    def __init__(self, size: int, pinning: Pinning | None = None, steps: Sequence[int] | None = None) -> None:
        if size < 0:
            raise ValueError(f"a slab of {size} bytes")
        self.size = aligned(size)
        self.pinned_bytes = 0
        self.note = ""
        self._pid = os.getpid()
        self._pinning = pinning
        self._registered: list[tuple[int, int]] = []  # where in the slab, and bytes
        self._mapped: Mapped | None = None
        if self.size == 0:
            return
        try:
            memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise StoreError(f"the system does not give {format_bytes(self.size)} of memory: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A request to a disk lists a few hundred pieces of memory, and a page is one: pages of 2 MB make fewer and
            # larger requests. On a virtio disk direct reads took 20% less time, writes 11%, and both 27% less CPU time.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._mapped = Mapped(memory)
        if pinning is not None:
            self._pin(pinning, [self.size] if steps is None else steps)

    def _pin(self, pinning: Pinning, steps: Sequence[int]) -> None:
        if sum(map(aligned, steps)) != self.size:
            raise ValueError(f"steps of {sum(map(aligned, steps))} bytes for a slab of {self.size}")
        address = self.view(0, self.size).data_ptr()
        for step in map(aligned, steps):
            if step == 0:
                continue
            if reason := pinning.register(address + self.pinned_bytes, step):
                self._leave_some(pinning, address, min(step, SPARE_BYTES))
                self.note = (
                    f"{format_bytes(self.pinned_bytes)} of {format_bytes(self.size)} are page-locked: at the next "
                    f"{format_bytes(step)} the driver said {reason!r}. The rest is copied through a staging buffer"
                )
                return
            self._registered.append((self.pinned_bytes, step))
            self._give_to_forks(self.pinned_bytes, step, shared=False)
            self.pinned_bytes += step

    def _leave_some(self, pinning: Pinning, address: int, size: int) -> None:
        """Give the last step back unless others can still page-lock so many bytes."""
        there = address + self.pinned_bytes
        if not pinning.register(there, size):
            pinning.unregister(there)
        elif self._registered:
            start, step = self._registered.pop()
            pinning.unregister(address + start)
            self._give_to_forks(start, step, shared=True)
            self.pinned_bytes = start

    def _give_to_forks(self, start: int, size: int, *, shared: bool) -> None:
        """Let processes that are forked have these bytes, or not. Of page-locked memory Linux makes each of them, as a
        loader's workers are, a copy of its own at once; before 5.9 the card could go on with pages that this process
        had no more. Whole pages (of 64 KB on some machines): a step may begin within one.
        """
        if self._mapped is not None and hasattr(mmap, "MADV_DONTFORK"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # the memory is as good without the advice
                self._mapped.advise(
                    mmap.MADV_DOFORK if shared else mmap.MADV_DONTFORK, first, min(start + size, self.size) - first
                )

    def view(self, start: int, size: int) -> Tensor:
        """Return bytes ``start`` to ``start + size`` as a uint8 tensor whose storage is these bytes and no more."""
        if self.size == 0 and start == size == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._mapped is None:
            raise ValueError("the slab is closed" if self.size else "the slab is empty")
        return self._mapped.view(start, size)

    def slots(self, sizes: Sequence[int]) -> list[Tensor]:
        """Cut the slab from its start into uint8 tensors of these sizes, each at a multiple of `ALIGNMENT`.

        Raises:
            ValueError: the slab is smaller than they need.
        """
        needed = sum(map(aligned, sizes))
        if needed > self.size:
            raise ValueError(f"slots of {needed} bytes in a slab of {self.size}")
        found, at = [], 0
        for size in sizes:
            found.append(self.view(at, size))
            at += aligned(size)
        return found

    def is_pinned(self, start: int, size: int) -> bool:
        """Tell whether all of these bytes are page-locked."""
        return size > 0 and start + size <= self.pinned_bytes

    def close(self, *, keep_viewed: bool = False) -> None:
        """Give the memory back at once; harmless when called twice.

        Its pages are free when this returns. A tensor that still views some of them sees zeros, and holds nothing but
        addresses.

        Args:
            keep_viewed: leave the bytes that tensors still view to them, until the last of these tensors is gone.
        """
        mapped = self._mapped
        if mapped is None:
            return
        forked = self._pid != os.getpid()  # and has neither the driver nor page-locked memory
        address = mapped.view(0, self.size).data_ptr()
        for start, size in () if forked else self._registered:
            assert self._pinning is not None
            self._pinning.unregister(address + start)
            self._give_to_forks(start, size, shared=True)
        self._registered, self.pinned_bytes, self._mapped = [], 0, None
        with contextlib.suppress(OSError) if forked else contextlib.nullcontext():
            mapped.close(mmap.MADV_DONTNEED, keep=keep_viewed)

    def __del__(self) -> None:
        # A slab that was not closed: what is viewed stays.
        if getattr(self, "_mapped", None) is not None:
            self.close(keep_viewed=True)
