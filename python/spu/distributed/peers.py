"""What the processes of a training tell one another at the end of a step: their gradients, and one small all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spu.distributed.job import Job
from spu.distributed.shared_memory import shared_places
from spu.distributed.shared_sums import SharedSums, place_bytes
from spu.distributed.step_consistency import BATCH, FACTOR, RATES, digest, rates_digest
from spu.distributed.sums import GradientSums, Sums
from spu.distributed.ties import Ties
from spu.engine.build import BuiltStages

__all__ = ["PipelinePeers"]

_SHARING = 8
"""Processes up to which each reads the gradients of all others; through sockets a ring moves those of two."""


class PipelinePeers:
    """The other processes of a training: see `spu.engine.peers.Peers`.

    Args:
        job: the processes.
        ranks: the place in the pipeline of each stage's process.
        built: the stages.
        grad_wire: the form in which gradients cross between pipelines.

    Attributes:
        ties: the parameters that several processes of a pipeline use.
        sums: adds up gradients over the pipelines; None: there is one.
    """

    def __init__(self, job: Job, ranks: Sequence[int], built: BuiltStages, grad_wire: str = "fp32") -> None:
        self._job, self.ties = job, Ties(job, ranks, built)
        self.own = frozenset(stage for stage, place in enumerate(ranks) if place == job.place)
        self._batch = torch.zeros((), dtype=torch.float64, device="cpu")  # of the step under way
        self.sums = None if job.alike is None else self._sums(built, job.alike, grad_wire)
        if self.sums is not None:
            job.let_go_with(self.sums)

    def parts(self, planned: int) -> int:
        """Return into how many microbatches all pipelines together cut a batch."""
        return planned * self._job.replicas

    def share(self, parts: int) -> range:
        """Return the microbatches of this process's pipeline: consecutive ones, the first pipelines' one more."""
        each, more = divmod(parts, self._job.replicas)
        first = self._job.replica * each + min(self._job.replica, more)
        return range(first, first + each + (self._job.replica < more))

    def begin(self, built: BuiltStages, backwards: int, batch: Any) -> None:
        """Begin a step with so many backwards of each stage: gradients are added up as the last ones fill them."""
        self.agree()
        self._batch = digest(batch)
        if self.sums is not None:
            late = {id(use.owner) for use in built.tied if not use.apart}
            self.sums.begin(self._leaves(built), late, backwards)

    def agree(self) -> None:
        """Give each parameter of several processes one value: see `spu.distributed.ties`."""
        self.ties.agree()

    def reduce(self) -> None:
        """Add up what :meth:`begin` began: each gradient is the same in all pipelines afterwards, to the last bit.

        Each use of a parameter over the pipelines, then the uses: the sums that one process adds to one another.
        """
        if self.sums is not None:
            alike = range(self._job.place, self._job.size, self._job.size // self._job.replicas)
            with self._job.exchanging("gradients", alike):
                self.sums.end()
        self.ties.add()

    def cancel(self) -> None:
        """Forget a step that failed."""
        if self.sums is not None:
            self.sums.cancel()

    def measured(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return a pipeline's part, by elements, of gradients that all of them have."""
        count, place = self._job.replicas, self._job.replica
        ends = [0, *accumulate(gradient.numel() for gradient in gradients)]
        return [g for g, start in zip(gradients, ends) if start * count // max(1, ends[-1]) == place]

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

        fp64 holds each exactly, and 0 adds nothing to it: with one pipeline the sums are those of one process, bit for
        bit. Not finite is what is not finite in one process.
        """
        own = torch.stack([loss.to(torch.float64).reshape(()), torch.tensor(float(trained), device="cpu").to(sums)])
        told: dict[str, float | torch.Tensor] = {BATCH: self._batch, FACTOR: lr_factor, RATES: rates_digest(groups)}
        together = self._job.total(torch.cat([sums.to(torch.float64), own]), told)
        if not bool(together[-1]):
            raise RuntimeError(
                "nothing to train: the loss depends on no parameter that requires a gradient. Unfreeze one, or look "
                "for a detach(), item() or no_grad() between the parameters and the loss"
            )
        return together[:-2], together[-2].to(torch.float32)

    def total(self, loss: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, of which each process has a part, fp32, 0-dimensional."""
        return self._job.total(loss.to(torch.float64).reshape(1), {BATCH: digest(batch)})[0].to(torch.float32)

    def _leaves(self, built: BuiltStages) -> dict[int, list[nn.Parameter]]:
        return {k: [*built.owned[k].values(), *self.ties.leaves(k)] for k in sorted(self.own)}

    def _sums(self, built: BuiltStages, group: dist.ProcessGroup, wire: str) -> Sums:
        """Return what adds up gradients over a group: in memory that they share, or over its transport."""
        few = 2 <= group.size() <= _SHARING and dist.get_backend(group) == "gloo"
        if few and wire == "fp32":
            on_cpu = all(built.stages[stage].device.torch_device.type == "cpu" for stage in self.own)
            size = place_bytes(sum(p.numel() for own in self._leaves(built).values() for p in own))
            places = shared_places(group, size, willing=on_cpu)
            if places is not None:
                return SharedSums(group, places)
        return GradientSums(group, wire)
