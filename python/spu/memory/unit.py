"""How a stage's tensors lie in regions: one region for each kind of bytes that travel together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spu.common.absent import absent, is_absent, reads_as_nan
from spu.common.file_memory import copy_in
from spu.memory.slab import aligned
from spu.memory.store import Region, Store

__all__ = ["Absent", "Entry", "Piece", "Unit", "allocated", "narrow", "piece"]

_ENTRY_ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a piece.

    Attributes:
        shape, dtype: of the tensor, which is contiguous.
        offset: of its first byte in the piece.
        put: makes a tensor of this shape and dtype the one that is worked on (``parameter.data = tensor``).
        get: returns the one that is worked on now; None if there is none yet, which means zeros.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    put: Callable[[Tensor], None]
    get: Callable[[], Tensor | None]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Return the tensor that lies in ``memory``, which is a piece's (uint8, contiguous)."""
        return memory[self.offset : self.offset + self.bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Piece:
    """Tensors that lie in one region and travel together.

    Attributes:
        name: for messages.
        entries: the tensors.
        bytes: of the region; a multiple of `ALIGNMENT`.
        region: its number in the store; -1 until it is allocated.
        key: the same for pieces of several units that share a region; None for others.
    """

    name: str
    entries: tuple[Entry, ...]
    bytes: int
    region: int = -1
    key: int | None = None

    def put(self, memory: Tensor) -> None:
        """Make the tensors in ``memory`` (uint8 [bytes]) the ones that are worked on."""
        for entry in self.entries:
            entry.put(entry.view(memory))

    def move_to(self, memory: Tensor, *, zeroed: bool) -> None:
        """Copy the tensors that are not in ``memory`` there, and work on them there.

        Args:
            memory: uint8 [bytes].
            zeroed: it holds zeros, so that those do not have to be written. What has no values yet (a stand-in of
                `spu.common.absent`, until its file is read) is left as zeros, too.
        """
        for entry in self.entries:
            view, present = entry.view(memory), entry.get()
            if zeroed and present is not None and is_absent(present):
                present = None
            if present is None and not zeroed:
                view.zero_()
            elif present is not None and not _same_place(present, view):
                copy_in(view, present)
            entry.put(view)

    def strays(self, memory: Tensor) -> list[tuple[Entry, Tensor]]:
        """Return the entries whose tensors are not in ``memory`` (uint8 [bytes]), with these."""
        pairs = [(entry, entry.get()) for entry in self.entries]
        return [(e, here) for e, here in pairs if here is not None and not _same_place(here, e.view(memory))]

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return the tensors in ``memory`` (uint8 [bytes]) in the order of the entries."""
        return [entry.view(memory) for entry in self.entries]


@dataclass
class Unit:
    """What is fetched and released together: the tensors of one stage.

    Attributes:
        index: of the stage.
        frozen: weights that never change; they are read and never written.
        trained: weights that this stage's optimizer updates.
        shared: weights that other stages use too, a piece for each.
        owned: regions of ``shared`` that this stage's optimizer updates (their keys until they are allocated).
        grads: gradients as they wait below; None where nothing is trained.
        sums: fp32 gradients as they add up on the device, where those below are narrower; it has no region.
        state: the optimizer's tensors; None likewise.
    """

    index: int
    frozen: Piece | None = None
    trained: Piece | None = None
    shared: tuple[Piece, ...] = ()
    owned: frozenset[int] = frozenset()
    grads: Piece | None = None
    sums: Piece | None = None
    state: Piece | None = None

    @property
    def weights(self) -> list[Piece]:
        """The pieces that a forward needs, in the order in which they lie in a slot."""
        return [p for p in (self.frozen, self.trained, *self.shared) if p is not None]

    @property
    def pieces(self) -> list[Piece]:
        """All pieces."""
        return [*self.weights, *(p for p in (self.grads, self.state) if p is not None)]

    @property
    def written(self) -> list[Piece]:
        """The pieces of weights that an update changes."""
        own = [] if self.trained is None else [self.trained]
        return [*own, *(p for p in self.shared if p.region in self.owned)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a slot for the weights."""
        return sum(p.bytes for p in self.weights)

    @property
    def grad_bytes(self) -> int:
        """Bytes of a slot for the gradients as they wait below."""
        return 0 if self.grads is None else self.grads.bytes

    @property
    def accumulators(self) -> Piece:
        """Where gradients add up, in a buffer of a backward visit."""
        piece = self.sums or self.grads
        assert piece is not None
        return piece

    @property
    def sum_bytes(self) -> int:
        """Bytes of a slot for the gradients while they add up."""
        return 0 if self.grads is None else self.accumulators.bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of a slot for the optimizer's tensors."""
        return 0 if self.state is None else self.state.bytes


def piece(
    name: str,
    tensors: Iterable[tuple[Sequence[int], torch.dtype, Callable[[Tensor], None], Callable[[], Tensor | None]]],
    key: int | None = None,
) -> Piece | None:
    """Lay tensors out one after the other.

    Args:
        name: for messages.
        tensors: (shape, dtype, put, get) of each, as in `Entry`.
        key: as in `Piece`.

    Returns:
        The piece; None without tensors.
    """
    entries, at = [], 0
    for shape, dtype, put, get in tensors:
        entry = Entry(tuple(shape), dtype, at, put, get)
        entries.append(entry)
        at = aligned(at + entry.bytes, _ENTRY_ALIGNMENT)
    return Piece(name, tuple(entries), aligned(at), key=key) if entries else None


def narrow(wide: Piece, narrow: Piece, memory: Tensor) -> None:
    """Round tensors to the dtype of another piece, in the same memory, from its first byte on.

    Elements k to 2k of a tensor of fp32 lie behind the place of their 16-bit values, so that each copy's ends are
    apart: it takes as many copies as a tensor's size has bits, and no memory.

    Args:
        wide: what lies in ``memory`` before.
        narrow: what lies there afterwards: the same tensors, in half the bytes or less.
        memory: uint8, at least ``wide.bytes``.
    """
    for source, target in zip(wide.entries, narrow.entries, strict=True):
        values, made = source.view(memory).flatten(), target.view(memory).flatten()
        first = min(1, len(values))
        made[:first] = values[:first].clone()
        while first < len(values):
            made[first : 2 * first] = values[first : 2 * first]
            first *= 2


def _same_place(present: Tensor, view: Tensor) -> bool:
    """Tell whether a tensor has the bytes of a contiguous view, in its order (a ``t()`` has them in another)."""
    return present.data_ptr() == view.data_ptr() and present.is_contiguous()


class Absent:
    """Stand-ins for the tensors of units that are elsewhere; see `spu.common.absent`.

    Args:
        units: whose.
        device: where the stand-ins of weights lie; those of gradients and of the optimizer's tensors are on the CPU.
    """

    def __init__(self, units: Iterable[Unit], device: torch.device) -> None:
        self.device = device
        self._units = list(units)
        self._of: dict[int, Tensor] = {}
        for unit in self._units:
            weights = [entry for piece in unit.weights for entry in piece.entries]
            others = [entry for piece in (unit.grads, unit.state) if piece is not None for entry in piece.entries]
            self._of.update((id(entry), absent(entry.shape, entry.dtype, device)) for entry in weights)
            self._of.update((id(entry), absent(entry.shape, entry.dtype)) for entry in others)

    def put(self, *pieces: Piece | None) -> None:
        """Put the stand-ins where the tensors of pieces are worked on."""
        for entry in (entry for piece in pieces if piece is not None for entry in piece.entries):
            entry.put(self._of[id(entry)])

    def written_over(self) -> list[tuple[int, Entry]]:
        """Return the weights that have something else than their stand-ins, with their stages; put these back.

        A stand-in cannot refuse everything: ``fill_`` writes into it, and ``parameter.data = tensor`` replaces it.
        """
        weights = [(unit.index, piece) for unit in self._units for piece in unit.weights]
        allowed: dict[Region, list[set[int]]] = {}  # a shared weight may have the stand-in of any of its stages
        for _, piece in weights:
            for entry, pointers in zip(piece.entries, allowed.setdefault(piece.region, [set() for _ in piece.entries])):
                pointers.add(self._of[id(entry)].data_ptr())
        found = []
        for stage, piece in weights:
            for entry, pointers in zip(piece.entries, allowed[piece.region], strict=True):
                here = entry.get()
                if here is not None and here.numel() and not (here.data_ptr() in pointers and reads_as_nan(here)):
                    found.append((stage, entry))
        for _, entry in found:
            self._of[id(entry)] = absent(entry.shape, entry.dtype, self.device)
            entry.put(self._of[id(entry)])
        return found


def allocated(
    units: Mapping[int, Unit], store: Store, further: Sequence[int] = ()
) -> tuple[dict[int, Unit], list[tuple[Region, int]]]:
    """Return the units with regions of a store for all of their pieces; a shared weight has one for all its stages.

    Args:
        units: by stage.
        store: new, without regions.
        further: bytes of further regions, for activations.

    Returns:
        The units, and the further regions with their bytes.

    Raises:
        StoreError: the store has no room for them.
    """
    pieces: dict[object, Piece] = {}
    for unit in units.values():
        for each in (unit.frozen, unit.trained, unit.grads, unit.state):
            if each is not None:
                pieces[id(each)] = each
        pieces.update((each.key, each) for each in unit.shared)
    more = [aligned(size) for size in further]
    names = [p.name for p in pieces.values()] + [f"activation {k}" for k in range(len(more))]
    numbers = store.allocate(names, [p.bytes for p in pieces.values()] + more)
    region = dict(zip(pieces, numbers))

    def placed(each: Piece | None) -> Piece | None:
        return None if each is None else replace(each, region=region[id(each)])

    result = {}
    for index, unit in units.items():
        result[index] = replace(
            unit,
            frozen=placed(unit.frozen),
            trained=placed(unit.trained),
            shared=tuple(replace(each, region=region[each.key]) for each in unit.shared),
            owned=frozenset(region[key] for key in unit.owned),
            grads=placed(unit.grads),
            state=placed(unit.state),
        )
    return result, list(zip(numbers[len(pieces) :], more, strict=True))
