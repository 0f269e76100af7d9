"""Residency of a layer's weights: fetch them before the layer's work, release them after it.

A stage calls ``fetch`` before anything reads or writes a layer's parameters on its device, and ``release`` when that
work is done. Calls come in pairs from the thread of the stage's rank, one layer after another, and never overlap for
the same layer of the same stage:

    forward of a microbatch     for each layer in order: fetch, run, release
    backward of a microbatch    fetch every layer from last to first, run, release in the same order
    deferred weight gradients   the same as a backward

Between a run of the schedule and the next one everything is released: the optimizer, a checkpoint and the user's own
code have to fetch what they read. A layer that stays on its device needs none of this, and `Resident` does nothing.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

__all__ = ["RESIDENT", "Residency", "Resident"]


class Residency(Protocol):
    """Brings a layer's weights to the device that computes with them, and takes them away afterwards.

    An implementation that moves a parameter swaps its ``data`` as a whole: copying in place into memory that autograd
    has saved for a backward would change its version counter, and the backward would raise.
    """

    def fetch(self, module: nn.Module) -> None:
        """Return when work that is enqueued from now on sees the module's weights on its device."""

    def release(self, module: nn.Module) -> None:
        """Allow the weights to leave the device as soon as the work enqueued so far is done."""


class Resident:
    """The residency of a layer that always stays on its device: nothing to do."""

    def fetch(self, module: nn.Module) -> None:
        """Do nothing: the weights are there."""

    def release(self, module: nn.Module) -> None:
        """Do nothing: the weights stay."""


RESIDENT = Resident()
