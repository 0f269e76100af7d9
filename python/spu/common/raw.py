"""Tensors as memory: their bytes, and writing where elements share it."""

from __future__ import annotations

import torch

__all__ = ["bytes_of", "flat", "some_of", "write"]

_SOME = 64  # of all: they would be read from a disk


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in their order, [numel], one beside the other; the same memory if they lie so.

    ``contiguous()`` and ``reshape(-1)`` leave a tensor of one element its stride (``y[::2][:1]`` has 2); torch views
    memory as another dtype only where the stride is 1.
    """
    dense = tensor.contiguous()
    return dense.as_strided((dense.numel(),), (1,))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes in the order of its elements, uint8 [bytes]; the same memory if they lie so."""
    return flat(tensor.detach()).view(torch.uint8)


def some_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return some of a tensor's elements, from its beginning to its end: [64 to 127], or all of fewer."""
    elements = tensor.detach().reshape(-1)
    return elements[torch.arange(0, elements.numel(), max(1, elements.numel() // _SOME), device=elements.device)]


def write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a tensor, also into one that was expanded (``torch.ones(1).expand(8)``): once into its memory.

    Raises:
        ValueError: they differ where they would share memory.
    """
    shared = [dim for dim in range(tensor.dim()) if tensor.stride(dim) == 0 and tensor.shape[dim] > 1]
    if not shared:
        tensor.copy_(values)
        return
    once = tuple(slice(0, 1) if dim in shared else slice(None) for dim in range(tensor.dim()))
    if not torch.equal(values[once].expand_as(values), values):
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} is expanded and cannot hold values that differ: clone() it"
        )
    tensor[once].copy_(values[once])
