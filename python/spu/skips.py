"""Skip connections that jump over layers, and so over stages and devices (after torchgpipe's skippable modules).

A layer leaves a tensor under a name, a later one takes it::

    class Down(nn.Module):
        def forward(self, x):
            x = self.conv(x)
            spu.skips.stash("level 1", x)
            return self.pool(x)

    class Up(nn.Module):
        def forward(self, x):
            return self.conv(torch.cat([self.upsample(x), spu.skips.pop("level 1")], 1))

In a plain model, called layer after layer on one thread, that is all there is to it. In a pipeline the tensor goes
straight from the stage that stashed it to the one that pops it, and its gradient straight back; the stages between them
never see it. (In a hand-run loop over ``trainer.modules()`` that detaches between the parts a skip
would keep the very graph that the detach is to cut: that is an error, which says to hand such tensors on as outputs.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

__all__ = ["Carrier", "Shelf", "carried_by", "pop", "stash"]


class Carrier(Protocol):
    """Takes stashed tensors and returns popped ones."""

    def stash(self, name: str, tensor: Tensor) -> None:
        """Take a tensor."""

    def pop(self, name: str) -> Tensor:
        """Give it back, once."""


class Shelf:
    """The carrier of a plain model: what one thread has stashed and not yet popped."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def stash(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor  # a forward that failed half-way may have left another one

    def pop(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(_nothing(name, self.tensors))
        return self.tensors.pop(name)


class ReplayedSkips:
    """Repeats a layer's pops in a recomputation with the same tensors, and ignores its stashes."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._popped: dict[str, Tensor] = {}
        self._replaying = False

    def stash(self, name: str, tensor: Tensor) -> None:
        if not self._replaying:
            self._carrier.stash(name, tensor)

    def pop(self, name: str) -> Tensor:
        if not self._replaying:
            self._popped[name] = self._carrier.pop(name)
        return self._popped[name]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Replay the pops of a recomputation; it may be within the first run (a backward in a forward)."""
        before, self._replaying = self._replaying, True
        try:
            with carried_by(self):
                yield
        finally:
            self._replaying = before


class _Current(threading.local):
    def __init__(self) -> None:
        self.carrier: Carrier = Shelf()


_CURRENT = _Current()


def stash(name: str, tensor: Tensor) -> None:
    """Leave a tensor for a later layer of the same forward, which takes it by `pop`.

    Args:
        name: any text; in use until it is popped.
        tensor: of any dtype; its gradient comes back to here.

    Raises:
        TypeError: not a tensor.
        ValueError: in a pipeline, if the name is in use.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"stash takes a tensor, got {type(tensor).__name__} for {name!r}")
    _CURRENT.carrier.stash(name, tensor)


def pop(name: str) -> Tensor:
    """Return the tensor that an earlier layer of this forward stashed under a name, on this layer's device.

    Raises:
        ValueError: nothing was stashed under that name, or it was popped before.
    """
    return _CURRENT.carrier.pop(name)


def current_carrier() -> Carrier:
    """Return the carrier of this thread."""
    return _CURRENT.carrier


@contextmanager
def carried_by(carrier: Carrier) -> Iterator[None]:
    """Send this thread's stashes and pops to ``carrier`` while the block runs."""
    before, _CURRENT.carrier = _CURRENT.carrier, carrier
    try:
        yield
    finally:
        _CURRENT.carrier = before


def _nothing(name: str, there: dict[str, Tensor]) -> str:
    known = ", ".join(map(repr, there)) or "nothing"
    return f"no layer before this one has stashed {name!r}, or it was popped already; there is {known}"
