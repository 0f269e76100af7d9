"""Where the regions of a store lie, and what may be read into and written from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from spu.memory.store import ALIGNMENT, Region

__all__ = ["Layout"]


class Layout:
    """Regions one after the other.

    Args:
        names: of the regions.
        sizes: bytes of each; multiples of `ALIGNMENT`.

    Attributes:
        starts: byte at which each begins.
        size: of all of them together.

    Raises:
        ValueError: for a size that is not such a multiple, or when there are not as many names as sizes.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        if len(names) != len(sizes):
            raise ValueError(f"{len(names)} names for {len(sizes)} regions")
        for name, size in zip(names, sizes, strict=True):
            if size < 0 or size % ALIGNMENT:
                raise ValueError(f"{name} has {size} bytes; round up to a multiple of {ALIGNMENT}")
        self.names = list(names)
        self.sizes = list(sizes)
        ends = list(accumulate(self.sizes))
        self.starts = [end - size for end, size in zip(ends, self.sizes, strict=True)]
        self.size = ends[-1] if ends else 0

    def check(self, region: Region, tensor: Tensor) -> None:
        """Raise ValueError if a tensor cannot be read into or written from.

        Args:
            region: whose first bytes they are.
            tensor: must be uint8, contiguous, on the CPU, begin at a multiple of `ALIGNMENT`, and hold such a multiple
                of bytes, no more than the region.
        """
        if not 0 <= region < len(self.sizes):
            raise ValueError(f"region {region} of {len(self.sizes)}")
        name = self.names[region]
        if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: contiguous uint8 memory on the CPU is needed, this is {tensor.dtype} on {tensor.device}, "
                f"strides {tensor.stride()}; use slot.view(torch.uint8)"
            )
        if tensor.numel() > self.sizes[region]:
            raise ValueError(f"{name} has {self.sizes[region]} bytes, the tensor has {tensor.numel()}")
        if tensor.numel() % ALIGNMENT or (tensor.numel() and tensor.data_ptr() % ALIGNMENT):
            raise ValueError(
                f"{name}: {tensor.numel()} bytes at address {tensor.data_ptr():#x} are not aligned to {ALIGNMENT}; "
                "use a slot of a Slab"
            )
