"""Modules and tensors on their way to another device."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["in_page_locked_memory", "move_module"]


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module in place; its parameters stay the objects that they are, and get other memory.

    Optimizers, masters and sinks know them by identity. ``torch.__future__`` may have been told to let ``Module.to``
    make others, or to swap them, which it refuses for parameters that somebody refers to weakly.
    """
    options = torch.__future__
    before = options.get_overwrite_module_params_on_conversion(), options.get_swap_module_params_on_conversion()
    options.set_overwrite_module_params_on_conversion(False)
    options.set_swap_module_params_on_conversion(False)
    try:
        module.to(device)
    finally:
        options.set_overwrite_module_params_on_conversion(before[0])
        options.set_swap_module_params_on_conversion(before[1])


def in_page_locked_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a host's tensor in memory that torch keeps from reuse until a card has read it.

    Also of one that lies in such memory (``pin_memory()`` returns that itself): whose it is may change it meanwhile.
    """
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)
