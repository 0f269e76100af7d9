"""A stage as torch.distributed.pipelining takes it: a module from one buffer to the next.

To autograd the whole stage is one function. Its forward unpacks the buffer, runs the stage and packs what goes on; its
backward runs the stage's own backward, within the loss scale's scope and with the layers' random draws, as the engine
of one process does. So nothing of a stage depends on which engine runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

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


class PackedStage(nn.Module):
    """Runs a stage between two boundaries.

    Args:
        stage: on this process's device.
        before, after: the boundaries; None at the model's ends.
        spans: gets what has run.
        defer: leave weight gradients to :meth:`weights`, for schedules that split the backward.
        sums: adds up gradients over pipelines; None: there is one.

    Attributes:
        work: the run in progress.
        number: of the microbatch that :meth:`forward` is called for next, in this run.
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
        super().__init__()
        self._sums = sums
        self._stage, self._before, self._after, self._defer = [stage], before, after, defer
        # Makes autograd call the backward of a stage whose input has no gradient. The stage's own parameters are not
        # this module's: nobody but the stage's updater touches them.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.work: Round | None = None
        self.number = 0
        self.sent_bytes = 0
        self._spans = spans
        self._undone: list[int] = []

    @property
    def stage(self) -> Stage:
        """The stage; not a submodule."""
        return self._stage[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the microbatch ``number``; each process has the batch itself.

        Args:
            x: the buffer from the stage before; of the first stage anything.

        Returns:
            The buffer for the next stage; of the last one a 0: losses are left in ``work``.
        """
        result: torch.Tensor = _Run.apply(self, self.number, x, self.anchor)  # type: ignore[no-untyped-call]
        return result

    def weights(self) -> Callable[[], None]:
        """Return what computes the weight gradients that the last backward has deferred."""
        index = self._undone.pop() if self._undone else -1

        def run() -> None:
            if index >= 0:
                with self._timed(Action(self.stage.index, "W", index)), self._summed(at_once=False):
                    self.stage.weight_backward(self._key(index))

        return run

    def run_forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Do the stage's part of :meth:`forward`."""
        stage, work = self.stage, self._working()
        device = stage.device.torch_device
        with self._timed(Action(stage.index, "F", index)), torch.set_grad_enabled(work.train), work.autocast():
            given = move(work.inputs[index], device) if self._before is None else self._before.read(x)
            inputs = move(work.inputs[index], device) if stage.wants_inputs else None
            skips = StageSkips(Exchange(), index, device, train=work.train)
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
                with torch.no_grad():
                    return self._sent(self._after.write(output))
            if work.keep_outputs:
                work.outputs[index] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
            if work.targets is not None:
                assert work.weights is not None
                scope = work.scopes[stage.index] if work.scopes is not None else None
                work.losses[index] = stage.loss(output, work.targets[index], work.weights[index], key, scope)
        return torch.zeros(1, device=device)

    def run_backward(self, index: int, buffer: torch.Tensor) -> torch.Tensor | None:
        """Run the backward of a microbatch; return the buffer of the gradients for the stage before."""
        stage, work = self.stage, self._working()
        assert work.scopes is not None
        with self._timed(Action(stage.index, "I" if self._defer else "B", index)):
            gradients = None if self._after is None else self._after.read_gradients(buffer)
            with nullcontext() if self._defer else self._summed(at_once=True):
                own = stage.backward(gradients, self._key(index), work.scopes[stage.index], defer=self._defer)
            if self._defer:
                self._undone.append(index)
            return None if self._before is None else self._sent(self._before.write_gradients(own))

    def clear(self) -> None:
        """Forget the run, finished or not."""
        self.work = None
        self._undone.clear()
        self.stage.clear()

    def _sent(self, buffer: torch.Tensor) -> torch.Tensor:
        self.sent_bytes += buffer.numel() * buffer.element_size()
        return buffer

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
    def _timed(self, action: Action) -> Iterator[None]:
        device = self.stage.device
        begin = mark(device.torch_device)
        try:
            yield
        except StageError:
            raise
        except Exception as error:
            raise StageError(self.stage.index, device.name, action, error) from error
        self._spans.append(MarkedSpan(action, begin, mark(device.torch_device)))


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: PackedStage, index: int, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.of = module, index
        return module.run_forward(index, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        module, index = ctx.of
        return None, None, module.run_backward(index, gradients[0]), None
