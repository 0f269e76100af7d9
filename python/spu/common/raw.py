"""The bytes of tensors."""

from __future__ import annotations

import torch

__all__ = ["bytes_of", "flat"]


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
