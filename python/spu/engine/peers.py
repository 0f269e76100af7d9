"""The other processes of a training, where its stages are in several: what the end of a step has to hear from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from spu.engine.build import BuiltStages

__all__ = ["Peers"]


class Peers(Protocol):
    """The other processes, seen from one; `spu.distributed.peers.PipelinePeers` is one.

    Attributes:
        own: indices of the stages that are in this process.
    """

    own: frozenset[int]

    def parts(self, planned: int) -> int:
        """Return into how many microbatches all processes together cut a batch, of which a plan has one pipeline's."""

    def share(self, parts: int) -> range:
        """Return the microbatches that go through this process's pipeline, of all of a batch."""

    def begin(self, built: BuiltStages, backwards: int, batch: Any) -> None:
        """Begin a step over a batch with so many backwards of each stage."""

    def agree(self) -> None:
        """Give a parameter that several processes use one value, if they may have different ones."""

    def reduce(self) -> None:
        """Add up the gradients of this process's parameters over the pipelines, which may have begun before; and over
        the processes that use one parameter.
        """

    def cancel(self) -> None:
        """Forget a step that failed."""

    def measured(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return those of a stage's gradients whose squares this process adds up: each is some process's."""

    def joined(
        self,
        sums: torch.Tensor,
        loss: torch.Tensor,
        *,
        trained: bool,
        lr_factor: float,
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of squares of every stage, and the loss, the same in each process.

        Args:
            sums: fp64, one for each stage, of what is :meth:`measured` here; 0 for those of other processes.
            loss: fp32, 0-dimensional; this process's part.
            trained: a parameter of this process has a gradient.
            lr_factor: what the rates of the coming update are multiplied by.
            groups: the settings of this process's optimizers.

        Raises:
            RuntimeError: none has in any process.
            ValueError: the processes have another batch, factor or settings.
        """

    def total(self, loss: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, of which each process has a part.

        Raises:
            ValueError: the processes have other batches.
        """
