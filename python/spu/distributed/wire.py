"""A boundary between two processes: each message is one buffer of fixed size, which says what is in it.

torch.distributed.pipelining moves tensors whose shapes do not change, and asks that they be of a floating-point type.
So a message's tensors, packed or as they are, lie one after the other in bytes that are viewed as fp32: nothing
computes with them on the way, and every bit arrives, NaNs' too. In front of them stands their description, in JSON. A
shorter microbatch leaves the end of the buffer unused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spu import ops
from spu.common.dtypes import STORAGE
from spu.common.raw import bytes_of
from spu.common.wire import MAX_NDIM, wire_bytes
from spu.engine.crossing import Layout

__all__ = ["Leaf", "Wire"]

_ALIGN = 64
_HEADER, _FOR_EACH = 1024, 512
"""Bytes for a message's description: of the structure, and of each tensor."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that crosses a boundary, before it has values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def plain(self) -> list[Any]:
        """Return it as JSON."""
        return [list(self.shape), str(self.dtype).removeprefix("torch."), self.requires_grad]

    @staticmethod
    def of(plain: Sequence[Any]) -> Leaf:
        """Return what :meth:`plain` has written down."""
        shape, dtype, requires_grad = plain
        return Leaf(tuple(shape), getattr(torch, dtype), requires_grad)


class Wire:
    """Writes and reads the messages of one boundary, in both directions.

    Args:
        leaves: the tensors of the largest message.
        codec: packs what has a gradient (`spu.ops.pack`); None: everything crosses as it is.
        after: the stage before the boundary, for errors.

    Attributes:
        size_bytes: of every message.
    """

    def __init__(self, leaves: Sequence[Leaf], codec: str | None, after: int) -> None:
        self.codec, self._after = codec, after
        self.size_bytes = _HEADER + sum(_FOR_EACH + _padded(self._bytes_of(leaf)) for leaf in leaves)
        # One microbatch's description is mostly that of the next one.
        self._wrote: tuple[list[Any], Layout | None, torch.Tensor] | None = None
        self._parsed: tuple[torch.Tensor, list[_Row | None], Layout | None] | None = None
        self._zeros = torch.zeros(0, dtype=torch.uint8, device="cpu")

    def example(self, *, train: bool) -> torch.Tensor:
        """Return a message without values: its shape and type."""
        return torch.empty(self.size_bytes // 4, device="meta", dtype=torch.float32).requires_grad_(train)

    def write(self, message: tuple[Sequence[torch.Tensor], Layout]) -> torch.Tensor:
        """Return the buffer of a stage's output, as `spu.engine.crossing.depart` gives it."""
        tensors, layout = message
        return self._write(tensors, layout, activations=True)

    def read(self, buffer: torch.Tensor) -> tuple[list[Any], Layout]:
        """Return the output that :meth:`write` was given, for `spu.engine.crossing.arrive`."""
        tensors, layout = self._read(buffer)
        assert layout is not None
        return tensors, layout

    def write_gradients(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return the buffer of the gradients of an output's tensors; None for a tensor without one."""
        return self._write(gradients, None, activations=False)

    def read_gradients(self, buffer: torch.Tensor) -> list[torch.Tensor | None]:
        """Return what :meth:`write_gradients` was given."""
        return self._read(buffer)[0]

    def _bytes_of(self, leaf: Leaf) -> int:
        if self.codec is not None and _packable(leaf) and leaf.requires_grad:
            return wire_bytes(leaf.shape, leaf.dtype, self.codec)
        return torch.Size(leaf.shape).numel() * leaf.dtype.itemsize

    def _write(
        self, tensors: Sequence[torch.Tensor | None], layout: Layout | None, *, activations: bool
    ) -> torch.Tensor:
        rows: list[Any] = []
        pieces: list[torch.Tensor] = []
        offset = 0
        for tensor in tensors:
            if tensor is None:
                rows.append(None)
                continue
            wanted = self.codec is not None and _packable(tensor) and (tensor.requires_grad or not activations)
            value, stride = tensor.detach(), _dense_stride(tensor)
            if wanted:
                piece, stride = ops.pack(value, self.codec or ""), None
            else:
                piece = _bytes_in_order(value, stride)
            name = str(tensor.dtype).removeprefix("torch.")
            rows.append([name, list(tensor.shape), stride, self.codec if wanted else None, offset, piece.numel()])
            pieces.append(piece)
            if missing := -piece.numel() % _ALIGN:
                pieces.append(self._zero(missing, piece.device))
            offset += _padded(piece.numel())
        front = self._front(rows, layout, pieces[0].device if pieces else torch.device("cpu"))
        used = front.numel() + offset
        self._check_fits(used)
        rest = self._zero(self.size_bytes - used, front.device)
        return torch.cat([front, *pieces, rest]).view(torch.float32)

    def _zero(self, size: int, device: torch.device) -> torch.Tensor:
        if self._zeros.numel() < size or self._zeros.device != device:
            self._zeros = torch.zeros(size, dtype=torch.uint8, device=device)
        return self._zeros[:size]

    def _front(self, rows: list[Any], layout: Layout | None, device: torch.device) -> torch.Tensor:
        """Return the description, uint8, padded: its length in eight bytes, then JSON."""
        if self._wrote is not None and self._wrote[:2] == (rows, layout) and self._wrote[2].device == device:
            return self._wrote[2]
        head = json.dumps([rows, None if layout is None else layout.plain()], separators=(",", ":")).encode()
        head = len(head).to_bytes(8, "little") + head
        front = torch.frombuffer(bytearray(head.ljust(_padded(len(head)), b"\0")), dtype=torch.uint8).to(device)
        if layout is None or layout.tensors_alone:
            self._wrote = rows, layout, front
        return front

    def _read(self, buffer: torch.Tensor) -> tuple[list[Any], Layout | None]:
        raw = buffer.detach().view(torch.uint8)
        if self._parsed is None or not torch.equal(raw[: self._parsed[0].numel()], self._parsed[0]):
            size = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
            rows, layout = json.loads(bytes(raw[8:size].cpu().numpy()))
            placed = [None if row is None else _Row.of(_padded(size), *row) for row in rows]
            self._parsed = raw[:size].clone(), placed, None if layout is None else Layout.of(layout)
        return [None if row is None else row.read(raw) for row in self._parsed[1]], self._parsed[2]

    def _check_fits(self, needed: int) -> None:
        if needed > self.size_bytes:
            raise ValueError(
                f"what stage {self._after} hands on takes {needed} bytes, and {self.size_bytes} were counted for it: "
                "its shapes or types depend on values, or later microbatches are larger, which cannot cross to another "
                "process; pad the batch, or train with engine='local'"
            )


class _Row(NamedTuple):
    """A tensor in a buffer: its own properties, the codec that it is packed by, and its bytes' place."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    codec: str | None
    start: int
    size: int

    @staticmethod
    def of(start: int, name: str, shape: list[int], stride: Any, codec: str | None, at: int, size: int) -> _Row:
        """Return it as `Wire` has written it down; ``start``: of the first tensor."""
        strides = torch.empty(shape, device="meta", dtype=torch.float32).stride() if stride is None else tuple(stride)
        return _Row(getattr(torch, name), tuple(shape), strides, codec, start + at, size)

    def read(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the tensor; one that is not packed lies in the buffer, uint8."""
        if self.codec is not None:
            return ops.unpack(raw[self.start : self.start + self.size], self.shape, self.dtype, codec=self.codec)
        whole = raw.view(self.dtype)
        start = whole.storage_offset() + self.start // self.dtype.itemsize
        values = whole.as_strided(self.shape, self.stride, start)
        # Views share a version counter, and a layer that changes its input in place would seem to change all of them.
        return values.data


def _packable(tensor: Leaf | torch.Tensor) -> bool:
    return tensor.dtype in STORAGE and len(tensor.shape) <= MAX_NDIM


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _dense_stride(tensor: torch.Tensor) -> list[int] | None:
    """Return the strides of a tensor that has every element between its first and its last once, but in another order
    than usual; None for all others, which arrive contiguous.
    """
    if tensor.is_contiguous() or not tensor.numel():
        return None
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride != expected:
            return None
        expected *= size
    return list(tensor.stride())


def _bytes_in_order(tensor: torch.Tensor, stride: list[int] | None) -> torch.Tensor:
    """Return the tensor's bytes, in the order of its memory if it has strides of its own."""
    if stride is None:
        return bytes_of(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
