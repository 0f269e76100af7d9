"""What the processes of a training tell one another at the end of a step: their gradients, and one small all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from spu.distributed.job import Job

__all__ = ["PipelinePeers"]

_BUCKET = 25 * 2**20 // 4  # elements


class PipelinePeers:
    """The other processes of a training: see `spu.engine.peers.Peers`.

    Args:
        job: the processes.
        ranks: the place in the pipeline of each stage's process.
    """

    def __init__(self, job: Job, ranks: Sequence[int]) -> None:
        self._job = job
        self.own = frozenset(stage for stage, place in enumerate(ranks) if place == job.place)

    def parts(self, planned: int) -> int:
        """Return into how many microbatches all pipelines together cut a batch."""
        return planned * self._job.replicas

    def share(self, parts: int) -> range:
        """Return the microbatches of this process's pipeline: consecutive ones, the first pipelines' one more."""
        each, more = divmod(parts, self._job.replicas)
        first = self._job.replica * each + min(self._job.replica, more)
        return range(first, first + each + (self._job.replica < more))

    @torch.no_grad()
    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of these parameters over the pipelines, in buckets of fp32, the next one filled while
        one is on its way. Each gradient is the same in all pipelines afterwards, to the last bit.

        A parameter that only some of them have used has a gradient in all of them.
        """
        group = self._job.alike
        if group is None or not parameters:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used, group=group)
        gradients = []
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
                gradients.append(parameter.grad)
        waiting = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            waiting.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
        for bucket, flat, work in waiting:
            work.wait()
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def joined(self, sums: torch.Tensor, loss: torch.Tensor, *, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of squares of every stage, and the loss, the same in each process.

        fp64 holds each exactly, and 0 adds nothing to it: the sums are those of one process, bit for bit. Not finite is
        what is not finite in one process: SUM keeps NaN and inf in every place, which MAX does not over gloo.
        """
        if not self._job.leads:
            sums = torch.zeros_like(sums)  # the first pipeline has the same
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


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield runs of gradients of about the size that hides a reduction's latency, as DistributedDataParallel's."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
