"""An engine whose stages are in several processes: torch.distributed.pipelining's schedules move the microbatches.

Every process has the whole batch, so a microbatch's number is all that a schedule has to hand out; what crosses
between two stages is a buffer of fixed size (`spu.distributed.wire`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from spu import ops
from spu.common.torch_private import pytree
from spu.common.tracker import MemoryTracker, Tally
from spu.distributed.job import Job
from spu.distributed.packed_stage import PackedStage
from spu.distributed.sums import Sums
from spu.distributed.wire import Leaf, Wire
from spu.engine.engine import MarkedSpan, Recording, Round, StageError
from spu.engine.graphs import StageGraphs
from spu.engine.microbatch import elements
from spu.engine.stage import Stage
from spu.memory.residency import RESIDENT, Residency

if TYPE_CHECKING:
    from spu.distributed.prompt_stage import PromptStage

__all__ = ["SCHEDULES", "DistributedEngine"]

SCHEDULES: dict[str, str] = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
"""Our names of torch's schedules. They run a stage's backwards in the same order as ours."""

_DEFERS = ("zb", "zbv")
_ONE_STAGE = ("gpipe", "1f1b")

Outputs = Callable[[Any], list[list[Leaf]]]
"""A microbatch's inputs -> the tensors that cross each boundary."""

_Form = tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]


class _Ready(NamedTuple):
    """A schedule for runs of one number of microbatches, with buffers of one size."""

    schedule: Any
    stages: list[PackedStage]
    prompt: list[PromptStage]
    sizes: tuple[int, ...]


class DistributedEngine:
    """Runs this process's stages by a schedule of torch.distributed.pipelining.

    Args:
        stages: of the whole model, in pipeline order; only this process's are run.
        ranks: the place in the pipeline of each stage's process.
        codecs: of each boundary.
        backend: a forced kernel backend, or None.
        job: the processes.
        schedule: our name of the schedule.
        outputs: what crosses, for an example of a microbatch; asked in rank 0.
        sums: adds up gradients over pipelines; None: there is one.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        ranks: Sequence[int],
        *,
        codecs: Sequence[str | None] = (),
        backend: str | None = None,
        job: Job,
        schedule: str,
        outputs: Outputs,
        sums: Sums | None = None,
    ) -> None:
        self.stages, self.ranks, self.backend = list(stages), list(ranks), backend
        self.graphs: StageGraphs | None = None
        self.tallies: list[Tally] | None = None
        self.here = frozenset({job.place})
        self.residencies: list[Residency] = [RESIDENT]
        self._job, self._schedule, self._outputs, self._sums = job, schedule, outputs, sums
        job.let_go_with(self)
        self._codecs = [  # within a process nothing is packed, as within a rank of one process
            None if codec == "none" or before == after else codec
            for codec, before, after in zip(codecs, self.ranks, self.ranks[1:])
        ]
        self._own = [stage for stage, rank in zip(self.stages, self.ranks) if rank == job.place]
        self._ready: dict[tuple[int, bool], _Ready] = {}
        self._counted: list[tuple[_Form, list[list[Leaf]]]] = []
        self._spans: list[MarkedSpan] = []
        self._sent_bytes = 0

    def run(self, work: Round) -> Recording:
        """Run a schedule to its end; losses are 0 in processes that do not have the last stage.

        Called in every process, also for no microbatches: what crosses is decided together.

        Raises:
            StageError: a stage of this process failed, or another process did while this one waited for it.
            ValueError: torch's schedule does not take this number of microbatches.
        """
        start = time.perf_counter()
        counting = nullcontext() if self.tallies is None else MemoryTracker(self.tallies[self._job.place])
        with ops.use_backend(self.backend), torch.set_grad_enabled(work.train), counting:
            ready = self._for(work)
            if ready is None:
                work.losses[0] = torch.zeros((), device=self._own[0].device.torch_device, dtype=torch.float32)
                return Recording(self.stages, self.ranks, start, [])
            parts = len(work.inputs)
            last = self._own[-1].is_last or self._own[0].is_last
            for stage in ready.stages:
                stage.work = work
            try:
                for each in ready.prompt:
                    each.begin(parts, self._job.idle)
                # A schedule cuts up targets for a loss, and the stage has made that already.
                targets = torch.empty(parts, dtype=torch.float32, device="cpu") if last and work.train else None
                ready.schedule.step(target=targets, return_outputs=False)
                for each in ready.prompt:
                    each.end()
            except BaseException as error:
                self._ready.clear()  # its messages are half received
                if not isinstance(error, Exception):
                    raise
                blamed = self._blamed(error)
                raise blamed from blamed.__cause__  # what a command's exit code goes by
            finally:
                for stage in ready.stages:
                    stage.clear()
                spans, self._spans[:] = list(self._spans), ()
        if not last and work.targets is not None:
            device = self._own[0].device.torch_device
            work.losses.update(
                {index: torch.zeros((), device=device, dtype=torch.float32) for index in range(len(work.inputs))}
            )
        return Recording(self.stages, self.ranks, start, spans)

    def each(self, task: Callable[[Stage], Any]) -> list[Any]:
        """Run ``task`` for every stage; those of other processes own nothing here.

        Raises:
            StageError: a task failed.
        """
        results = []
        for stage in self.stages:
            try:
                with ops.use_backend(self.backend):
                    results.append(task(stage))
            except Exception as error:
                raise StageError(stage.index, stage.device.name, None, error) from error
        return results

    def sent_bytes(self) -> int:
        """Return the bytes that this process has sent to its neighbours so far."""
        return self._sent_bytes + sum(stage.sent_bytes for ready in self._ready.values() for stage in ready.stages)

    def close(self) -> None:
        """Give back the buffers; the process group is whose it was."""
        self.let_go()
        if self._sums is not None:
            self._sums.close()

    def under_way(self) -> bool:
        """Return False: no group waits for a message from one process to another."""
        return False

    def let_go(self) -> None:
        """Give back the buffers, and the schedules, which keep the pipeline's group."""
        self._ready.clear()

    def _for(self, work: Round) -> _Ready | None:
        """Return the schedule for a run, made anew where its buffers would be too small, or twice too large; None for
        a run of no microbatches.
        """
        # The same in all processes, also where other pipelines have other microbatches: they count together or not.
        sample = max(work.inputs, key=elements) if work.largest is None else work.largest
        wires = self._wires(sample, train=work.train)
        if not work.inputs:
            return None
        key = len(work.inputs), work.train
        ready = self._ready.get(key)
        fits = ready is not None and all(
            wire.size_bytes <= size <= 2 * wire.size_bytes for wire, size in zip(wires, ready.sizes, strict=True)
        )
        if ready is None or not fits:
            if ready is not None:
                self._sent_bytes += sum(stage.sent_bytes for stage in ready.stages)
            ready = self._ready[key] = self._made(wires, *key)
        return ready

    def _wires(self, sample: Any, *, train: bool) -> list[Wire]:
        # Without a backward nothing has a gradient, and so nothing is packed, as over the links of one process.
        codecs = self._codecs if self._codecs and train else [None] * (len(self.stages) - 1)
        return [Wire(leaves, codec, index) for index, (leaves, codec) in enumerate(zip(self._crossing(sample), codecs))]

    def _crossing(self, sample: Any) -> list[list[Leaf]]:
        """Return what crosses each boundary at most, for a microbatch like this one.

        Rank 0 counts it once for microbatches of about this size: a smaller one crosses in the same buffers.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor)]
        form = tuple((tuple(leaf.shape), leaf.dtype, leaf.requires_grad) for leaf in leaves)
        for known, counted in self._counted:
            if _within(form, known):
                return counted
        told = self._job.decided(
            lambda: json.dumps([[leaf.plain() for leaf in own] for own in self._outputs(sample)]),
            "tell what crosses between the stages",
        )
        counted = [[Leaf.of(plain) for plain in own] for own in json.loads(told)]
        self._counted = [(form, counted), *self._counted[:7]]
        return counted

    def _made(self, wires: list[Wire], parts: int, train: bool) -> _Ready:
        from torch.distributed import pipelining  # more than a second, which only such a training pays

        from spu.distributed.prompt_stage import DirectStage, PromptStage

        kind = PromptStage if dist.get_backend(self._job.pipeline) == "gloo" else DirectStage
        defer = train and self._schedule in _DEFERS
        packed, made = [], []
        for stage in self._own:
            before = None if stage.is_first else wires[stage.index - 1]
            after = None if stage.is_last else wires[stage.index]
            packed.append(PackedStage(stage, before, after, self._spans, defer=defer, sums=self._sums))
            end = torch.empty(1, device="meta", dtype=torch.float32).requires_grad_(train)
            made.append(
                kind(
                    packed[-1],
                    stage.index,
                    len(self.stages),
                    stage.device.torch_device,
                    input_args=end if before is None else before.example(train=train),
                    output_args=end if after is None else after.example(train=train),
                    group=self._job.pipeline,
                    defers=defer,
                )
            )
        # Of fewer microbatches than stages torch takes no 1f1b, which would be gpipe, and a validation's last batch
        # may have few rows.
        short = self._schedule == "1f1b" and parts < len(self.stages)
        make = getattr(pipelining, SCHEDULES["gpipe" if short else self._schedule])
        # Each microbatch's share, and the loss scale, are in the stage's own backward.
        try:
            schedule = make(
                made[0] if self._schedule in _ONE_STAGE else made,
                parts,
                loss_fn=(lambda output, _: output) if train else None,
                scale_grads=False,
            )
        except ValueError as error:
            raise ValueError(
                f"schedule {self._schedule!r} of torch.distributed.pipelining does not take {parts} microbatches over "
                f"{len(self.stages)} stages: {error} Give another number of microbatches, leave out an epoch's short "
                "last batch (DataLoader(drop_last=True)), or take schedule='gpipe', which takes any number"
            ) from error
        prompt = [each for each in made if isinstance(each, PromptStage)]
        return _Ready(schedule, packed, prompt, tuple(wire.size_bytes for wire in wires))

    def _blamed(self, error: BaseException) -> Exception:
        """Return the stage's own error within torch's, or one that names the wait in which another process was lost."""
        for cause in _causes(error):
            if isinstance(cause, StageError):
                return cause
        done = self._spans[-1].action if self._spans else None
        stage = self._own[0] if done is None else self.stages[done.stage]
        others = [f"rank {rank} (stages {stages})" for rank, stages in self._job.neighbours(self.ranks).items()]
        of = "" if len(others) == 1 else "one of "
        after = "before its first action" if done is None else f"after its action {done}"
        lost = ConnectionError(
            f"rank {self._job.rank} waited, {after}, for {', '.join(others)}, {of}which has ended or no longer "
            f"answers; its own output says why. torch: {type(error).__name__}: {error}"
        )
        lost.__cause__ = error
        failed = StageError(stage.index, stage.device.name, done, lost)
        failed.__cause__ = lost
        return failed


def _within(form: _Form, known: _Form) -> bool:
    """Tell whether a microbatch is like a known one, no larger in any dimension, and at least half of its size."""
    alike = len(form) == len(known) and all(
        mine[1:] == other[1:] and len(mine[0]) == len(other[0]) and all(a <= b for a, b in zip(mine[0], other[0]))
        for mine, other in zip(form, known)
    )
    sizes = [sum(torch.Size(shape).numel() for shape, *_ in each) for each in (form, known)]
    return alike and 2 * sizes[0] >= sizes[1]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
