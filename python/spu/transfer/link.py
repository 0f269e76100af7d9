"""A link carries the tensors of one stage boundary, in one direction, to the next device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from spu import ops
from spu.common.dtypes import STORAGE
from spu.common.moves import in_page_locked_memory
from spu.common.torch_private import pytree
from spu.common.wire import MAX_NDIM
from spu.transfer.side import Side

__all__ = ["Link", "Packet"]


@dataclass(frozen=True)
class Packet:
    """A packed tensor: the wire, and the shape, dtype and codec, so that no header must be read."""

    wire: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    codec: str


class Link:
    """Carries pytrees of tensors to ``target``.

    With a codec, floating-point tensors are packed on the sender's device, so that only the wire crosses, and are
    unpacked on the receiver's. Integers, and everything where ``codec`` is None, cross unpacked: between two
    stages on the same device a tensor is passed on, not copied. So do tensors of more dimensions than a wire's header
    has room for, and, from a CPU, tensors that the codec would make infinite or NaN: a mask's -inf would spoil the
    finite values of its block.

    Args:
        target: the device that receives.
        codec: None, or a codec of :func:`spu.ops.pack`.
        side: where packing and copying run beside the sender's work; None: the sender does them.
        activations: pack only what needs a gradient: masks, positions and tables are exact or nothing.
    """

    def __init__(
        self, target: torch.device, codec: str | None = None, side: Side | None = None, *, activations: bool = False
    ) -> None:
        self.target = target
        self.codec = codec
        self._activations = activations
        self.sent_bytes = 0
        self._side = side

    def send(self, tree: Any) -> Any:
        """Detach, pack, and start the copy, on the sender's thread or beside its work."""
        if self._side is None:
            return pytree.tree_map_only(torch.Tensor, self._send, tree)
        return self._side.start(partial(self._send_beside, tree, ops.forced_backend()), tree)

    def receive(self, message: Any) -> Any:
        """Do :meth:`arrive`, then :meth:`unpack`."""
        return self.unpack(self.arrive(message))

    def arrive(self, message: Any) -> Any:
        """Wait for a copy that runs beside; called on the receiver's thread. Of a card its stream waits, not the
        thread.
        """
        return message if self._side is None else message.arrive(self.target)

    def unpack(self, message: Any) -> Any:
        """Return a message that has arrived with its packed tensors unpacked."""
        return pytree.tree_map_only(Packet, _unpack, message)

    def settle(self) -> None:
        """Keep nothing of what was sent, after a run's last message; called on the sender's thread."""
        if self._side is not None:
            self._side.settle()

    def close(self) -> None:
        """End the side; harmless when called twice."""
        if self._side is not None:
            self._side.close()

    def _send_beside(self, tree: Any, backend: str | None) -> Any:
        with torch.no_grad(), ops.use_backend(backend):
            return pytree.tree_map_only(torch.Tensor, self._send, tree)

    def _send(self, tensor: torch.Tensor) -> Any:
        wanted = tensor.dtype in STORAGE and tensor.dim() <= MAX_NDIM
        wanted = wanted and (tensor.requires_grad or not self._activations)
        tensor = tensor.detach()
        if self.codec is not None and wanted:
            wire = ops.pack(tensor, self.codec)
            # A GPU's wire is not checked: the host would wait for it.
            if tensor.is_cuda or ops.is_finite_wire(wire, tensor.shape, tensor.dtype, codec=self.codec):
                self.sent_bytes += wire.numel()
                return Packet(self._copy(wire), tensor.shape, tensor.dtype, self.codec)
        self.sent_bytes += tensor.numel() * tensor.element_size()
        return self._copy(tensor)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._side is not None and tensor.is_cuda != (self.target.type == "cuda"):
            # Only page-locked memory is copied beside, and of the caller's own a stage of the CPU may hand on.
            source = tensor if tensor.is_cuda else in_page_locked_memory(tensor)
            return source.to(self.target, non_blocking=True)  # who receives waits for the event
        # A copy to pageable host memory must have ended before the other thread reads it.
        return tensor.to(self.target, non_blocking=self.target.type != "cpu")


def _unpack(packet: Packet) -> torch.Tensor:
    return ops.unpack(packet.wire, packet.shape, packet.dtype, codec=packet.codec)
