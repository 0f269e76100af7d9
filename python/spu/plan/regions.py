"""The bytes of a streamed stage's regions in the tier below."""

from __future__ import annotations

from dataclasses import dataclass

from spu.plan.memory import ITEM_BYTES, StageBytes
from spu.settings import Settings

__all__ = ["ALIGNMENT", "Regions", "aligned"]

ALIGNMENT = 4096
"""Bytes to which regions and slots are rounded up, as `spu.memory.store` asks."""


def aligned(count: int) -> int:
    """Return a number of bytes rounded up as regions are."""
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Regions:
    """Bytes of a stage's regions, aligned, of the fp32 gradients on the device, and of the weights that are trained.

    A weight that an earlier stage has, too, lies in that stage's region, and in the slots of both. Its gradient from
    here is a tensor of its own on the device, until that stage's backward adds it up.
    """

    weights: int
    grads: int
    state: int
    sums: int
    trained: int
    tied_weights: int = 0
    tied_sums: int = 0

    @classmethod
    def of(cls, stage: StageBytes, settings: Settings, tied: tuple[int, int] = (0, 0)) -> Regions:
        """Return those of a stage, whose parameters and trained ones that earlier stages have, too, are ``tied``."""
        params, trained = tied
        count, state = stage.main_grad_bytes // 4 - trained, aligned(stage.master_bytes + stage.moment_bytes)
        item = ITEM_BYTES[settings.precision]
        frozen = stage.param_bytes - (count + params) * item  # these, the trained and the tied have a region each
        return cls(
            weights=aligned(frozen) + aligned(count * item) + aligned(params * item),
            grads=aligned(count * ITEM_BYTES[settings.grads]),
            state=state,
            sums=aligned(4 * count),
            trained=count * item,
            tied_weights=params * item,
            tied_sums=4 * trained,
        )

    @property
    def own_weights(self) -> int:
        """Bytes of the region of the weights that no earlier stage has."""
        return self.weights - aligned(self.tied_weights)

    @property
    def total(self) -> int:
        return self.own_weights + self.grads + self.state
