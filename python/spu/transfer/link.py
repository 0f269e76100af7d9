"""A link carries the tensors of one stage boundary, in one direction, to the next device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from spu import ops

__all__ = ["Link", "Packet"]

_PACKABLE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Packet:
    """A packed tensor on its way: the wire, and what the receiver must know to unpack it without reading a header."""

    wire: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    codec: str


class Link:
    """Carries pytrees of tensors to ``target``.

    With a codec, floating-point tensors are packed on the sender's device, so that only the wire crosses, and are
    unpacked on the receiver's. Integers, and everything where ``codec`` is None, cross as they are: between two
    stages on the same device a tensor is handed over, not copied.

    Args:
        target: the device that receives.
        codec: None, or a codec of :func:`spu.ops.pack`.
    """

    def __init__(self, target: torch.device, codec: str | None = None) -> None:
        self.target = target
        self.codec = codec
        self.sent_bytes = 0

    def send(self, tree: Any) -> Any:
        """On the sender's thread: detach, pack, and start the copy."""
        return pytree.tree_map_only(torch.Tensor, self._send, tree)

    def receive(self, message: Any) -> Any:
        """On the receiver's thread: unpack what was packed."""
        return pytree.tree_map_only(Packet, _unpack, message)

    def _send(self, tensor: torch.Tensor) -> Any:
        tensor = tensor.detach()
        if self.codec is None or tensor.dtype not in _PACKABLE:
            self.sent_bytes += tensor.numel() * tensor.element_size()
            return self._copy(tensor)
        wire = ops.pack(tensor, self.codec)
        self.sent_bytes += wire.numel()
        return Packet(self._copy(wire), tensor.shape, tensor.dtype, self.codec)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy to pageable host memory must have ended before the other thread reads it.
        return tensor.to(self.target, non_blocking=self.target.type != "cpu")


def _unpack(packet: Packet) -> torch.Tensor:
    return ops.unpack(packet.wire, packet.shape, packet.dtype, codec=packet.codec)
