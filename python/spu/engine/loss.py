"""The loss that is used where none is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["cross_entropy"]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The default loss: mean cross entropy in fp32.

    Args:
        outputs: logits [..., classes].
        targets: class indices int64 [...]; -100 is not counted.
    """
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())
