"""Between pinned host memory and a device: pack into it, unpack from it, copy lists of tensors in.

Each has two ways. The kernel of the CUDA library stores to or loads from host memory itself, over the link, in one
launch; the other packs (or converts) on the device and leaves the crossing to the copy engine, which works beside the
kernels. Which is faster must be measured: the table of the architecture says it (``spu.kernels.table``, rows ``pack_``,
``unpack_`` and ``copy_in_``, with the backend ``cuda`` for the kernel); where it says nothing, the copy engine.

All are asynchronous on the current stream of the device. Host memory that they read or write must stay alive, and may
be read, only after that stream has come past them: torch's allocator does not know of a kernel's accesses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from spu.common import wire
from spu.ops import schema
from spu.ops.dispatch import DTYPES, choose_backend, select_cuda, status_of
from spu.ops.reference import composed

__all__ = ["copy_in", "pack_to_host", "unpack_from_host"]


def _by_kernel(op: str, on_device: Tensor, stores: bool | None) -> bool:
    """Tell whether the CUDA library's kernel does the crossing."""
    if not on_device.is_cuda:
        return False
    if stores is None:
        capability = torch.cuda.get_device_capability(on_device.device)
        return on_device.dtype in DTYPES["cuda"] and select_cuda(op, on_device.dtype, capability, ()) == "cuda"
    if stores and not status_of("cuda").available:
        status = status_of("cuda")
        raise RuntimeError(f"stores=True needs the CUDA library: {status.reason}. Fix: {status.fix}")
    return stores


def _run(op: str, on_device: Tensor, stores: bool | None, *arguments: object) -> None:
    if _by_kernel(op, on_device, stores):
        schema.overload(op, "cuda")(*arguments)
    else:
        backend = choose_backend(on_device, op=op.removesuffix("_"))
        composed.implementation(op, backend)(*arguments)


@torch.no_grad()
def pack_to_host(x: Tensor, codec: str, out: Tensor | None = None, *, stores: bool | None = None) -> Tensor:
    """Pack a tensor into host memory: ``pack`` and the copy in one call.

    Args:
        x: fp16, bf16 or fp32, of up to 5 dimensions, any device.
        codec: of ``spu.ops.CODECS``.
        out: uint8 [wire_bytes(x.shape, x.dtype, codec)] on the host, contiguous; pinned if x is on a CUDA device.
            Default: new memory of this kind.
        stores: True: by a kernel's stores; False: by the copy engine; None: by the table.

    Returns:
        ``out``.

    Raises:
        ValueError: for an ``out`` that does not fit, or an unknown codec.
        RuntimeError: ``stores=True`` without the CUDA library.
    """
    wire.check_source(x.shape, x.dtype)
    size = wire.wire_bytes(x.shape, x.dtype, codec)
    if out is None:
        out = torch.empty(size, dtype=torch.uint8, pin_memory=x.is_cuda, device="cpu")
    _check_host(out, size, x)
    _run("pack_", x, stores, x, codec, out)
    return out


@torch.no_grad()
def unpack_from_host(packed: Tensor, out: Tensor, codec: str, *, stores: bool | None = None) -> Tensor:
    """Unpack a wire in host memory into a tensor on a device.

    Args:
        packed: uint8, as ``pack_to_host`` makes it.
        out: the shape that was packed; fp16, bf16 or fp32.
        stores: as for ``pack_to_host``: True: a kernel loads from host memory itself.

    Returns:
        ``out``.
    """
    wire.check_source(out.shape, out.dtype)
    _check_host(packed, wire.wire_bytes(out.shape, out.dtype, codec), out)
    _run("unpack_", out, stores, packed, codec, out)
    return out


@torch.no_grad()
def copy_in(sources: Sequence[Tensor], targets: Sequence[Tensor], *, stores: bool | None = None) -> None:
    """Copy a list of tensors, each widened or narrowed to its target's dtype on arrival.

    Args:
        sources: on the host (pinned, if they are to be copied without waiting) or the targets' device; contiguous.
        targets: fp16, bf16 or fp32, of the sources' shapes, contiguous, on one device.
        stores: True: one launch for all of them, whose loads reach into host memory; False: a copy each, by the copy
            engine, in the source's dtype; None: by the table.

    Raises:
        ValueError: for lists of different lengths or tensors of different shapes.
    """
    if len(sources) != len(targets):
        raise ValueError(f"copy_in: {len(sources)} sources for {len(targets)} targets")
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source.shape != target.shape or target.device != targets[0].device or not target.is_contiguous():
            raise ValueError(
                f"copy_in: target {i} is {tuple(target.shape)} on {target.device}, its source {tuple(source.shape)}: "
                f"targets have their sources' shapes, are contiguous and on one device (the first: {targets[0].device})"
            )
    if targets:
        _run("copy_in_", targets[0], stores, list(sources), list(targets))
        increment_version([target for target in targets if target.is_cpu and not target.is_inference()])


def _check_host(packed: Tensor, size: int, on_device: Tensor) -> None:
    good = packed.dtype == torch.uint8 and packed.shape == (size,) and packed.device.type == "cpu"
    if not good or not packed.is_contiguous():
        raise ValueError(
            f"the wire of {tuple(on_device.shape)} is uint8 of shape ({size},) on the host, contiguous; got "
            f"{packed.dtype} {tuple(packed.shape)} on {packed.device}"
        )
    if on_device.is_cuda and not packed.is_pinned():
        raise ValueError("the wire must be in pinned host memory: make it with torch.empty(..., pin_memory=True)")
