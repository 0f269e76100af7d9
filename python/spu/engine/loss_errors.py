"""What a loss that failed was given: torch's own words name neither shapes nor what to change."""

from __future__ import annotations

from typing import Any

import torch

from spu.common.out_of_memory import is_out_of_memory
from spu.engine.head_loss import HeadInput

__all__ = ["EXPLAINED", "explained"]

EXPLAINED = (ValueError, TypeError, IndexError, RuntimeError)


def explained(error: Exception, outputs: Any, targets: Any) -> Exception:
    """Return an error of the same class that also says what the loss was given; the error itself where it is another
    one than wrong arguments raise.

    Args:
        error: that a loss has raised.
        outputs, targets: of the microbatch.
    """
    if type(error) not in EXPLAINED or is_out_of_memory(error) or not isinstance(targets, torch.Tensor):
        return error
    if isinstance(outputs, HeadInput):  # the logits that nobody made
        outputs = outputs.hidden.new_empty((*outputs.hidden.shape[:-1], len(outputs.weight)), device="meta")
    given = f"targets {_form(targets)}"
    if isinstance(outputs, torch.Tensor):
        given = f"outputs {_form(outputs)} and {given}"
    return type(error)(f"{error} (of a microbatch, loss_fn was given {given}{_fix(error, targets)})")


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fix(error: Exception, targets: torch.Tensor) -> str:
    if "to be Long" in str(error):
        return ": class indices are int64, give targets.long()"
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if isinstance(error, IndexError) and whole and targets.numel() and targets.device.type == "cpu":
        return f", which go from {int(targets.min())} to {int(targets.max())}"
    return ""
