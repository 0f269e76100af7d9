"""What the processes of a training tell one another at the end of a step: one small all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spu.distributed.job import Job

__all__ = ["PipelinePeers"]


class PipelinePeers:
    """The other processes of a training: see `spu.engine.peers.Peers`.

    Args:
        job: the processes.
        ranks: the place in the pipeline of each stage's process.
    """

    def __init__(self, job: Job, ranks: Sequence[int]) -> None:
        self._job = job
        self.own = frozenset(stage for stage, place in enumerate(ranks) if place == job.place)

    def joined(self, sums: torch.Tensor, loss: torch.Tensor, *, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of squares of every stage, and the loss, the same in each process.

        fp64 holds each exactly, and 0 adds nothing to it: the sums are those of one process, bit for bit. Not finite is
        what is not finite in one process: SUM keeps NaN and inf in every place, which MAX does not over gloo.
        """
        own = torch.stack([loss.to(torch.float64).reshape(()), torch.tensor(float(trained)).to(sums)])
        together = self._job.total(torch.cat([sums.to(torch.float64), own]))
        if not bool(together[-1]):
            raise RuntimeError(
                "nothing to train: the loss depends on no parameter that requires a gradient. Unfreeze one, or look "
                "for a detach(), item() or no_grad() between the parameters and the loss"
            )
        return together[:-2], together[-2].to(torch.float32)

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss of which each process has a part, fp32, 0-dimensional."""
        return self._job.total(loss.to(torch.float64).reshape(1))[0].to(torch.float32)
