"""The state of a training whose stages are in several processes, seen from rank 0: each tensor is sent when it is read.

So rank 0 never holds the others' state: what it writes goes through its memory one tensor at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spu.checkpoint.writing import Elsewhere
from spu.distributed.job import Job
from spu.engine.base import Sample, sampled
from spu.engine.build import BuiltStages
from spu.engine.generators import generator_states
from spu.engine.joined import whole
from spu.engine.optimizer_state import Optimizers
from spu.engine.state import TrainingState, frozen_parameters, model_state, training_state

__all__ = ["Far", "gathered_samples", "save_state", "with_tensors"]

_END, _WAIT = -1, -2  # in the place of a tensor's number
_WORD_S = 10.0  # between two words to a process that has nothing to send


@dataclass(frozen=True)
class Far:
    """A tensor of another process, which sends it when it is read (`spu.checkpoint.writing.Elsewhere`).

    Attributes:
        rank: of that process.
        number: of the tensor among those that it has named.
    """

    shape: torch.Size
    dtype: torch.dtype
    rank: int
    number: int
    _job: Job
    _asked: _Asked

    def read(self) -> torch.Tensor:
        """Return the tensor, on the CPU."""
        self._asked.ask(self.rank, self.number)
        return self._job.receive(self.shape, self.dtype, self.rank)


class _Asked:
    """Rank 0's side of the talk: the others give up on who says nothing for long, so that they hear a word at times."""

    def __init__(self, job: Job) -> None:
        self._job, self._last = job, time.monotonic()

    def ask(self, rank: int, number: int) -> None:
        if time.monotonic() - self._last > _WORD_S:
            self.say(_WAIT)
        self._job.send(torch.tensor([number], device="cpu"), rank)

    def say(self, word: int) -> None:
        self._last = time.monotonic()
        for rank in range(1, self._job.size):
            self._job.send(torch.tensor([word], device="cpu"), rank)


def with_tensors(
    job: Job, tensors: Mapping[str, torch.Tensor | Elsewhere], work: Callable[[dict[str, Any]], str], what: str
) -> str:
    """Call ``work`` in rank 0 with the tensors of the first pipeline's processes, and return what it returns in all.

    Called in every process; the others send what ``work`` reads.

    Args:
        job: the processes.
        tensors: of this process, by name.
        work: takes tensors, or what is read as one (`Elsewhere`), once or more often.
        what: it does, for errors.

    Raises:
        ValueError: it failed; rank 0 itself raises what it met.
    """
    forms = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} if job.leads else {}
    told = job.gathered(forms)
    if job.rank != 0:
        names = list(forms)
        while (number := int(job.receive((1,), torch.int64, 0))) != _END:
            if number != _WAIT:
                job.send(whole(tensors[names[number]]), 0)
        return job.decided(str, what)

    def led() -> str:
        asked = _Asked(job)
        found: dict[str, torch.Tensor | Elsewhere] = dict(tensors)
        for rank, theirs in list(enumerate(told))[1:]:
            for number, (name, (shape, dtype)) in enumerate(theirs.items()):
                found.setdefault(name, Far(torch.Size(shape), dtype, rank, number, job, asked))
        try:
            return work(found)
        finally:
            asked.say(_END)

    return job.decided(led, what)


def save_state(
    job: Job,
    path: str | Path,
    built: BuiltStages,
    optimizers: Optimizers,
    own: frozenset[int],
    meta: dict[str, Any],
    *,
    frozen: bool,
) -> None:
    """Write a checkpoint of all stages, in rank 0: the tensors that one process would have written, in their order.

    Called in every process.

    Args:
        job: the processes.
        path, meta: as `TrainingState.save` takes them.
        built, optimizers: all stages; only this process's have values of now.
        own: indices of these.
        frozen: as in `training_state`.

    Raises:
        CheckpointError: the optimizer's state cannot be saved, in its process; or writing failed, in rank 0.
        ValueError: writing failed, in the others.
    """
    part = training_state(built.only(own), optimizers, frozen=frozen)
    groups = [stage for stage in sorted(own) if optimizers[stage] is not None]
    mine = (groups, part.optimizer, part.extra, part.frozen) if job.leads else ([], part.optimizer, {}, {})
    told = job.gathered((*mine, generator_states(built.only(own).stages)))
    extra, resting = dict[str, Any](), dict[str, Sample]()
    generators: dict[str, str] = {}
    for _, _, theirs, samples, states in told:
        extra |= theirs
        resting |= samples
        generators |= {name: state for name, state in states.items() if name not in generators}

    def write(tensors: dict[str, torch.Tensor | Elsewhere]) -> str:
        order = _order(built, optimizers)
        ordered = dict(sorted(tensors.items(), key=lambda item: _place(item[0], order)))
        joined = _joined([(groups, rest) for groups, rest, *_ in told])
        TrainingState(ordered, resting, joined, extra).save(path, {**meta, "generators": generators})
        return "done"

    with_tensors(job, part.tensors, write, "save")


def gathered_samples(job: Job, built: BuiltStages, own: frozenset[int]) -> dict[str, Sample]:
    """Return what is kept of the frozen parameters of all processes; called in each."""
    found: dict[str, Sample] = {}
    for theirs in job.gathered(sampled(frozen_parameters(built.only(own)))):
        found |= theirs
    return found


def _order(built: BuiltStages, optimizers: Optimizers) -> dict[str, int]:
    return {name: index for index, name in enumerate(model_state(built, optimizers))}


def _place(full: str, order: Mapping[str, int]) -> tuple[int, int]:
    """Return where a tensor stands among those of a checkpoint; equal ones stay as they are."""
    prefix, _, name = full.partition(":")
    if prefix == "optimizer":
        name = name.rpartition("/")[0]
    return ("model", "optimizer", "extra").index(prefix), order.get(name, len(order))


def _joined(told: Iterable[tuple[Sequence[int], Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what is no tensor of all optimizers' state, for stages in order."""
    told = list(told)
    rows = [
        (stage, group, count)
        for stages, rest in told
        for stage, group, count in zip(stages, rest["groups"], rest["owned"])
    ]
    rows.sort(key=lambda row: row[0])
    plain = {name: value for _, rest in told for name, value in rest["plain"].items()}
    kind = next((rest["kind"] for _, rest in told if rest["kind"]), "")
    return {"kind": kind, "plain": plain, "groups": [row[1] for row in rows], "owned": [row[2] for row in rows]}
