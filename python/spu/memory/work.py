"""What a residency asks of an engine: to run deferred updates, and to make gradients where it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Work"]


class Work(Protocol):
    """What is done with a stage's tensors while they are here."""

    def prepare(self, stage: int) -> None:
        """Bring what the stage's optimizer has into the form that moves below."""

    def pending(self, stage: int) -> bool:
        """Tell whether an update of the stage is deferred."""

    def update(self, stage: int, grads: Sequence[Tensor]) -> bool:
        """Run the deferred update on the tensors that have been put; tell whether it has changed any.

        Args:
            stage: its index.
            grads: its gradients, in the order of its piece.
        """

    def lend(self, stage: int, grads: Sequence[Tensor]) -> None:
        """Let a backward write its gradients into these tensors, whose present values mean nothing."""

    def collect(self, stage: int, grads: Sequence[Tensor]) -> None:
        """Have all gradients in the lent tensors and forget these."""
