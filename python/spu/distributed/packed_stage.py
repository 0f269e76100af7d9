"""A stage from one buffer to the next, as `spu.distributed.prompt_stage` runs it.

A forward unpacks the buffer, runs the stage and packs what goes on; a backward runs the stage's own backward, within
the loss scale's scope and with the layers' random draws, as the engine of one process does. So nothing of a stage
depends on which engine runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from spu.common.torch_private import pytree
from spu.devices.clock import mark
from spu.distributed.sums import Sums
from spu.distributed.wire import Wire
from spu.engine.channel import Exchange
from spu.engine.engine import MarkedSpan, Round, StageError
from spu.engine.microbatch import move
from spu.engine.skips import StageSkips
from spu.engine.stage import Stage
from spu.model.layers import DrawKey
from spu.schedules import Action

__all__ = ["PackedStage"]


class PackedStage:
    """Runs a stage between two boundaries.

    Args:
        stage: on this process's device.
        before, after: the boundaries; None at the model's ends.
        spans: gets what has run.
        defer: leave weight gradients to :meth:`weights`, for schedules that split the backward.
        sums: adds up gradients over pipelines; None: there is one.

    Attributes:
        stage: as given.
        work: the run in progress.
        sent_bytes: to other stages, so far.
    """

    def __init__(
        self,
        stage: Stage,
        before: Wire | None,
        after: Wire | None,
        spans: list[MarkedSpan],
        *,
        defer: bool,
        sums: Sums | None = None,
    ) -> None:
        self.stage, self._before, self._after, self._defer = stage, before, after, defer
        self._sums, self._spans = sums, spans
        self._nothing = Exchange()  # no skip connection leaves a process
        self.work: Round | None = None
        self.sent_bytes = 0

    def forward(self, index: int, buffer: torch.Tensor | None) -> torch.Tensor:
        """Run the forward of a microbatch of this run; each process has the batch itself.

        Args:
            index: the microbatch's number in the run.
            buffer: from the stage before; None at the model's begin.

        Returns:
            The buffer for the next stage; of the last one a 0: losses are left in ``work``.
        """
        stage, work = self.stage, self._working()
        device = stage.device.torch_device
        with self._timed("F", index), work.autocast():
            if self._before is None:
                given = move(work.inputs[index], device)
            else:
                assert buffer is not None
                given = self._before.read(buffer)
            inputs = move(work.inputs[index], device) if stage.wants_inputs else None
            skips = StageSkips(self._nothing, index, device, train=work.train)
            whole = work.keep_outputs or work.targets is None
            key = self._key(index)
            output = stage.forward(given, inputs, key, train=work.train, skips=skips, whole=whole)
            for name, _ in skips.outgoing():
                raise ValueError(
                    f"{name} in stage {stage.index}, is popped in another stage, and so in another process: "
                    "engine='distributed' carries no skip connections; keep both ends in one stage, by a plan of your "
                    "own, or train with engine='local'"
                )
            if self._after is not None:
                return self._sent(self._after.write(output))
            if work.keep_outputs:
                work.outputs[index] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
            if work.targets is not None:
                assert work.weights is not None
                scope = work.scopes[stage.index] if work.scopes is not None else None
                work.losses[index] = stage.loss(output, work.targets[index], work.weights[index], key, scope)
        return torch.zeros(1, device=device, dtype=torch.float32)

    def backward(self, index: int, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Run the backward of a microbatch.

        Args:
            index: as given to :meth:`forward`.
            buffer: of the gradients, from the next stage; None at the model's end.

        Returns:
            The buffer of the gradients for the stage before; None at the model's begin.
        """
        stage, work = self.stage, self._working()
        assert work.scopes is not None
        with self._timed("I" if self._defer else "B", index):
            gradients = None
            if self._after is not None:
                assert buffer is not None
                gradients = self._after.read_gradients(buffer)
            with nullcontext() if self._defer else self._summed(at_once=True):
                own = stage.backward(gradients, self._key(index), work.scopes[stage.index], defer=self._defer)
            return None if self._before is None else self._sent(self._before.write_gradients(own))

    def weights(self, index: int) -> None:
        """Compute the weight gradients that the backward of a microbatch has deferred."""
        with self._timed("W", index), self._summed(at_once=False):
            self.stage.weight_backward(self._key(index))

    def clear(self) -> None:
        """Forget the run, finished or not."""
        self.work = None
        self.stage.clear()

    def _sent(self, buffer: torch.Tensor) -> torch.Tensor:
        self.sent_bytes += buffer.nbytes
        return buffer.to(self.stage.device.torch_device)  # a message without tensors was on none; NCCL reads a GPU's

    def _summed(self, *, at_once: bool) -> AbstractContextManager[None]:
        if self._sums is None:
            return nullcontext()
        return self._sums.backward(self.stage.index, self.stage.parameters(), at_once=at_once)

    def _working(self) -> Round:
        assert self.work is not None
        return self.work

    def _key(self, index: int) -> DrawKey:
        work = self._working()
        return DrawKey(work.run_seed, work.step, work.first_microbatch + index)

    @contextlib.contextmanager
    def _timed(self, kind: str, index: int) -> Iterator[None]:
        device, action = self.stage.device, Action(self.stage.index, kind, index)
        begin = mark(device.torch_device)
        try:
            yield
        except StageError:
            raise
        except Exception as error:
            raise StageError(self.stage.index, device.name, action, error) from error
        self._spans.append(MarkedSpan(action, begin, mark(device.torch_device)))
