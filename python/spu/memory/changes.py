"""Changes of weights where they would be lost: by a stage while it runs, and between the homes of two weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spu.common.torch_private import version
from spu.memory.checksum import checksum
from spu.memory.store import Store
from spu.memory.unit import Piece, Unit

__all__ = ["Watch", "take_out"]


class Watch:
    """Notices that a stage changes a weight of its own while it runs; the slot it lies in is not written back."""

    def __init__(self) -> None:
        self._sure: set[tuple[int, bool]] = set()  # units that have run without, and whether in training
        self._seen: list[object] = []

    def begin(self, unit: Unit, slot: Iterable[Tensor]) -> None:
        """Note a unit's weights, which lie in these bytes (uint8, contiguous), before it runs."""
        self._seen = self._marks(unit, slot)

    def check(self, unit: Unit, slot: Iterable[Tensor]) -> None:
        """Raise RuntimeError if they have changed since `begin`."""
        if self._seen != self._marks(unit, slot):
            raise RuntimeError(
                f"stage {unit.index} changes a weight of its own while it runs, and the slot it lies in is not written "
                "back: change it between steps, after flush(), or train with residency='offloaded'"
            )
        self._sure.add((unit.index, torch.is_grad_enabled()))

    def _marks(self, unit: Unit, slot: Iterable[Tensor]) -> list[object]:
        """Return numbers that change with the weights.

        ``parameter.data.clamp_()`` changes bytes alone. Their checksums are taken until the unit has run once: an
        evaluation says nothing of a training.
        """
        tensors = [entry.get() for piece in unit.weights for entry in piece.entries]
        own: list[object] = [(version(tensor), tensor.data_ptr()) for tensor in tensors if tensor is not None]
        if (unit.index, torch.is_grad_enabled()) not in self._sure:
            own += [checksum(memory.numpy()) for memory in slot if memory.numel() and memory.device.type == "cpu"]
        return own


def take_out(units: Iterable[Unit], store: Store) -> None:
    """Give weights that lie in another one's home memory of their own, before that home is filled."""
    pieces: Sequence[Piece] = [piece for unit in units for piece in unit.weights]
    homes = {piece.region: store.home(piece.region) for piece in pieces}
    starts = {home.untyped_storage().data_ptr() for home in homes.values()}
    for piece in pieces:
        for entry, present in piece.strays(homes[piece.region]):
            if present.numel() and present.untyped_storage().data_ptr() in starts:
                entry.put(present.clone())
