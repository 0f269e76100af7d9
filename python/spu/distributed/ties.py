"""Parameters that stages of several processes use: their gradients meet where the first of these stages is.

That stage's process, the parameter's *home*, has its master, its optimizer state, its part of the norm and its place in
checkpoints, as the stage has in one process (`spu.engine.sharing`). The other processes send it the gradients of their
uses; it adds them in the order of stages, in fp32, and sends the new value back. So there is one sum and one update,
whatever the optimizer is, and every process has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from spu.distributed.job import Job
from spu.engine.build import BuiltStages
from spu.engine.sharing import TiedUse

__all__ = ["Ties"]


class Ties:
    """The parameters that stages of several processes use, seen from one of these.

    Args:
        job: the processes.
        ranks: the place in the pipeline of each stage's process.
        built: the stages; their tied uses are told which of them are this class's (``apart``), and which have their
            stage in this process (``here``).

    Attributes:
        uses: of trained parameters in further stages than their first, in the order in which gradients are added up.
    """

    def __init__(self, job: Job, ranks: Sequence[int], built: BuiltStages) -> None:
        self._job, self._ranks = job, ranks
        places: dict[int, set[int]] = {}
        for use in built.tied:
            places.setdefault(id(use.owner), {ranks[use.owner_stage]}).add(ranks[use.stage])
        for use in built.tied:
            use.apart, use.here = len(places[id(use.owner)]) > 1, ranks[use.stage] == job.place
        self.uses = [use for use in built.tied if use.apart and use.owner.requires_grad]
        self._shared: dict[int, tuple[nn.Parameter, int, list[int]]] = {}
        for use in self.uses:
            home = ranks[use.owner_stage]
            self._shared[id(use.owner)] = use.owner, home, sorted(places[id(use.owner)] - {home})
        self._differ = bool(self.uses)

    def leaves(self, stage: int) -> list[nn.Parameter]:
        """Return the leaves that a stage has of parameters whose first stage is another one."""
        return [use.alias for use in self.uses if use.stage == stage]

    def add(self) -> None:
        """Add up the gradients of all uses, in each parameter's home; the others have none afterwards.

        Raises:
            ConnectionError: a process has ended, or no longer answers.
        """
        with self._told("gradients"):
            self._add()
        self._differ = bool(self.uses)

    def _add(self) -> None:
        sent: list[tuple[dist.Work, torch.Tensor]] = []
        for use in self.uses:  # one order in every process, and no send waits: so none waits for one that waits for it
            home, place = self._ranks[use.owner_stage], self._ranks[use.stage]
            if self._job.place == place:
                gradient, use.alias.grad = use.alias.grad, None
                if place == home:
                    use.add(gradient)
                else:
                    sent += self._posted(gradient, home)
            elif self._job.place == home:
                use.add(self._received(use, place))
        _wait(sent)

    def agree(self) -> None:
        """Give each parameter its home's value in all processes that use it, if it may have changed since then.

        Raises:
            ConnectionError: a process has ended, or no longer answers.
        """
        if self._differ:
            with self._told("values"):
                self._give()
        self._differ = False

    def _give(self) -> None:
        sent: list[tuple[dist.Work, torch.Tensor]] = []
        for parameter, home, others in self._shared.values():
            if self._job.place == home:
                for place in others:
                    sent += self._job.post(parameter, self._job.rank_of(place))
            elif self._job.place in others:
                value = self._job.receive(parameter.shape, parameter.dtype, self._job.rank_of(home))
                with torch.no_grad():
                    parameter.copy_(value)
        _wait(sent)  # before the user may write into what is sent

    def changed(self) -> None:
        """Note that homes have other values than the other processes: a checkpoint was loaded."""
        self._differ = bool(self.uses)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        places = {place for _, home, others in self._shared.values() for place in (home, *others)}
        ranks = [self._job.rank_of(place) for place in sorted(places)]
        with self._job.exchanging(f"the {what} of weights that several stages use", ranks):
            yield

    def _posted(self, gradient: torch.Tensor | None, home: int) -> list[tuple[dist.Work, torch.Tensor]]:
        rank = self._job.rank_of(home)
        said = self._job.post(torch.tensor([gradient is not None], device="cpu"), rank)
        return said if gradient is None else said + self._job.post(gradient, rank)

    def _received(self, use: TiedUse, place: int) -> torch.Tensor | None:
        rank = self._job.rank_of(place)
        if not self._job.receive((1,), torch.bool, rank):
            return None
        return self._job.receive(use.owner.shape, torch.float32, rank)  # as all main gradients


def _wait(sent: Sequence[tuple[dist.Work, torch.Tensor]]) -> None:
    for work, _ in sent:  # which must not be freed before
        work.wait()
