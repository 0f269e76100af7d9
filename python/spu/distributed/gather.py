"""The state of a training whose stages are in several processes, brought together in rank 0 tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spu.distributed.job import Job
from spu.engine.build import BuiltStages
from spu.engine.generators import generator_states
from spu.engine.optimizer_state import Optimizers
from spu.engine.state import TrainingState, frozen_parameters, training_state

__all__ = ["gathered_generators", "gathered_state"]


def gathered_state(
    job: Job, built: BuiltStages, optimizers: Optimizers, own: frozenset[int], *, frozen: bool = True
) -> TrainingState | None:
    """Return the state of all stages in rank 0, whose host memory holds the other processes' meanwhile; None elsewhere.

    Called in every process.

    Args:
        job: the processes.
        built, optimizers: all stages; only this process's have values of now.
        own: indices of these.
        frozen: as in `training_state`.

    Raises:
        CheckpointError: the optimizer's state cannot be saved; raised in its process.
    """
    part = training_state(_some(built, own), optimizers, frozen=frozen)
    groups = [stage for stage in sorted(own) if optimizers[stage] is not None]
    forms = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in part.tensors.items()}
    if not job.leads:  # a replica has what another pipeline has
        forms = {}
    told = job.gathered((groups if job.leads else [], part.optimizer, part.extra if job.leads else {}, forms))
    if job.rank != 0:
        for name in forms:
            job.send(part.tensors[name], 0)
        return None
    tensors, extra = dict(part.tensors), dict(part.extra)
    for rank, (_, _, theirs, forms) in list(enumerate(told))[1:]:
        extra |= theirs
        for name, (shape, dtype) in forms.items():
            tensors[name] = job.receive(shape, getattr(torch, dtype), rank)
    resting = {} if frozen else frozen_parameters(built)
    return TrainingState(tensors, resting, _joined([(groups, rest) for groups, rest, _, _ in told]), extra)


def gathered_generators(job: Job, built: BuiltStages, own: frozenset[int]) -> dict[str, str]:
    """Return the states of the model's own generators, by name, each from the process that draws from it."""
    states: dict[str, str] = {}
    for theirs in job.gathered(generator_states(_some(built, own).stages)):
        states |= {name: state for name, state in theirs.items() if name not in states}
    return states


def _some(built: BuiltStages, own: frozenset[int]) -> BuiltStages:
    return dataclasses.replace(built, stages=[stage for stage in built.stages if stage.index in own])


def _joined(told: Sequence[tuple[list[int], Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what is no tensor of all optimizers' state, for stages in order."""
    rows = [
        (stage, group, count)
        for stages, rest in told
        for stage, group, count in zip(stages, rest["groups"], rest["owned"])
    ]
    rows.sort(key=lambda row: row[0])
    plain = {name: value for _, rest in told for name, value in rest["plain"].items()}
    kind = next((rest["kind"] for _, rest in told if rest["kind"]), "")
    return {"kind": kind, "plain": plain, "groups": [row[1] for row in rows], "owned": [row[2] for row in rows]}
