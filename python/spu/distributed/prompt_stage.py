"""Torch's pipelining stages, as spu needs them: one that runs its microbatches itself, and one whose messages do not
wait for its schedule, for backends that move each one by itself, as gloo.

Torch's own stage runs a module, and autograd over what that returns. A stage of spu's has a forward and a backward
of its own, from buffer to buffer, so a schedule's actions call these and nothing lies between: to put the stage into a
module and an autograd function, for torch's stage to call, took 0.2 ms more for each microbatch of a small model.

Torch's schedules post a receive when its microbatch is due, and wait for what they send before they compute on. Gloo
moves a message only once both ends have asked for it, so each then costs its whole way there while the receiver stands
still. Here all receives of a run are posted before the first forward, into buffers that the stage has anyway, a send
leaves as soon as it can, and nothing is waited for but what the next action reads. On a card the messages of one NCCL
communicator run in the order in which they were posted: there a schedule's own order has to stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

__all__ = ["DirectStage", "PromptStage", "Work"]

_UNDER_WAY = 2  # sends of a stage, whose buffers live until they have arrived


class Work(Protocol):
    """A stage's part of each microbatch, from the buffer of one boundary to that of the other; None at the ends."""

    def forward(self, index: int, buffer: Tensor | None) -> Tensor:
        """Run a forward; the last stage returns anything."""

    def backward(self, index: int, buffer: Tensor | None) -> Tensor | None:
        """Run the backward of a microbatch that :meth:`forward` was called for."""

    def weights(self, index: int) -> None:
        """Do what a backward has put off, under schedules that split it."""


class DirectStage(pipelining.PipelineStage):
    """A ``PipelineStage`` without a module.

    Args:
        work: does the microbatches.
        index, count: of this stage, and of all.
        device: the stage's.
        input_args, output_args: tensors like the buffers of the two boundaries, which cross as they are.
        group: the pipeline's.
        defers: a backward leaves a part to ``work.weights``.
    """

    def __init__(
        self,
        work: Work,
        index: int,
        count: int,
        device: torch.device,
        *,
        input_args: Tensor,
        output_args: Tensor,
        group: dist.ProcessGroup | None = None,
        defers: bool = False,
    ) -> None:
        super().__init__(nn.Module(), index, count, device, input_args=input_args, output_args=output_args, group=group)
        self._work, self._defers = work, defers

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Tensor:
        """Run a microbatch's forward."""
        buffer = None if self.is_first else self.args_recv_info[fwd_chunk_id][0].buffer
        output = self._work.forward(fwd_chunk_id, buffer)
        self.fwd_cache[fwd_chunk_id] = (output,), []  # where `get_fwd_send_ops` looks
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch's backward; without ``full_backward`` its weights' part is left."""
        if not self.has_backward:
            return
        self.fwd_cache.pop(bwd_chunk_id)
        buffer = None if self.is_last else self.grad_recv_info[bwd_chunk_id][0].buffer
        self.bwd_cache[bwd_chunk_id] = (self._work.backward(bwd_chunk_id, buffer),)
        if full_backward and self._defers:
            self._work.weights(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the weights' part of a microbatch's backward."""
        if self.has_backward and self._defers:
            self._work.weights(bwd_chunk_id)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradients of a microbatch's input; without a backward none, for which torch's zbv schedule asks
        too, and 2.13's stages refuse that.
        """
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of a microbatch's output; without a backward there are none."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class PromptStage(DirectStage):
    """A `DirectStage`, to be told where a run begins and ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts = 0
        self._posted: dict[tuple[str, int], dist.Work] | None = None
        self._under_way: deque[dist.Work] = deque()
        self._idle: Callable[[], AbstractContextManager[None]] = nullcontext

    def begin(self, parts: int, idle: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Begin a run of so many microbatches, whose messages are waited for in contexts from ``idle``."""
        self._parts, self._posted, self._idle = parts, None, idle
        self._under_way.clear()

    def end(self) -> None:
        """Wait until everything has left."""
        while self._under_way:
            self._under_way.popleft().wait()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return nothing to do: it is posted already."""
        self._post()
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return nothing to do: it is posted already."""
        self._post()
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a microbatch's output; return nothing to do."""
        if self._is_elsewhere(self.stage_index + 1):
            (output,), _ = self.fwd_cache[fwd_chunk_id]
            self._send(output, self.stage_index + 1, self._tag("F", self.stage_index))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a microbatch's gradients; return nothing to do."""
        if self.has_backward and self._is_elsewhere(self.stage_index - 1):
            gradients = self.bwd_cache.pop(bwd_chunk_id)[0]
            assert gradients is not None
            self._send(gradients, self.stage_index - 1, self._tag("B", self.stage_index - 1))
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Tensor:
        """Run a microbatch's forward as soon as its input is here."""
        self._await("F", fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch's backward as soon as its output's gradients are here."""
        self._await("B", bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, full_backward=full_backward)

    def _post(self) -> None:
        """Post all receives of this run, once: the stage has its buffers only after the schedule has begun."""
        if self._posted is not None:
            return
        self._posted = {}
        for part in range(self._parts):
            if self._is_elsewhere(self.stage_index - 1):
                tag = self._tag("F", self.stage_index - 1)
                self._posted["F", part] = self._receive(self.args_recv_info[part], self.stage_index - 1, tag)
            if self.has_backward and self._is_elsewhere(self.stage_index + 1):
                tag = self._tag("B", self.stage_index)
                self._posted["B", part] = self._receive(self.grad_recv_info[part], self.stage_index + 1, tag)

    def _is_elsewhere(self, stage: int) -> bool:
        """Tell whether there is such a stage, in another process: within one, a schedule hands tensors on itself."""
        return 0 <= stage < self.num_stages and self.stage_index_to_group_rank[stage] != self.group_rank

    def _await(self, kind: str, part: int) -> None:
        self._post()
        assert self._posted is not None
        posted = self._posted.pop((kind, part), None)
        if posted is not None:
            with self._idle():
                posted.wait()

    def _receive(self, infos: Any, stage: int, tag: int) -> dist.Work:
        source = self.stage_index_to_group_rank[stage]
        work: dist.Work | None = dist.irecv(infos[0].buffer, group=self.group, group_src=source, tag=tag)
        assert work is not None
        return work

    def _send(self, buffer: Tensor, stage: int, tag: int) -> None:
        while len(self._under_way) >= _UNDER_WAY:
            self._under_way.popleft().wait()
        target = self.stage_index_to_group_rank[stage]
        work: dist.Work | None = dist.isend(buffer, group=self.group, group_dst=target, tag=tag)
        assert work is not None
        self._under_way.append(work)

    def _tag(self, kind: str, boundary: int) -> int:
        """Return a number for one direction over one boundary: two processes may have several in common.

        A forward without a backward has its own: where one process evaluates while another trains, each waits for
        what does not come, and says so. Tag 0 is of what torch's schedules ask one another before their first run.
        """
        return 3 * boundary + (2 if kind == "B" else 1 if self.has_backward else 3)
