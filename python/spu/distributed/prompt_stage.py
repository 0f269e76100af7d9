"""Torch's pipelining stages, as spu needs them: one that can run without a backward under every schedule, and one whose
messages do not wait for its schedule, for backends that move each one by itself, as gloo.

Torch's schedules post a receive when its microbatch is due, and wait for what they send before they compute on. Gloo
moves a message only once both ends have asked for it, so each then costs its whole way there while the receiver stands
still. Here all receives of a run are posted before the first forward, into buffers that the stage has anyway, a send
leaves as soon as it can, and nothing is waited for but what the next action reads. On a card the messages of one NCCL
communicator run in the order in which they were posted: there a schedule's own order has to stay.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch.distributed as dist
from torch.distributed import pipelining

__all__ = ["EvaluableStage", "PromptStage"]

_UNDER_WAY = 2  # sends of a stage, whose buffers live until they have arrived


class EvaluableStage(pipelining.PipelineStage):
    """A ``PipelineStage`` for runs without a backward too.

    There torch's zbv schedule hands gradients from stage to stage of a process as ever, and 2.13's stages refuse that.
    Its module is told which microbatch is next: by an argument of the schedule's, every stage would cut one up.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch's forward."""
        module: Any = self.submod
        module.number = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradients of a microbatch's input; without a backward none."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of a microbatch's output; without a backward there are none."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class PromptStage(EvaluableStage):
    """A ``PipelineStage``, to be told where a run begins and ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts = 0
        self._posted: dict[tuple[str, int], list[dist.Work]] | None = None
        self._sent: deque[list[dist.Work]] = deque()

    def begin(self, parts: int) -> None:
        """Begin a run of so many microbatches."""
        self._parts, self._posted = parts, None
        self._sent.clear()

    def end(self) -> None:
        """Wait until everything has left."""
        while self._sent:
            _wait(self._sent.popleft())

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
        self._send(super().get_fwd_send_ops(fwd_chunk_id), "F", self.stage_index)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a microbatch's gradients; return nothing to do."""
        self._send(super().get_bwd_send_ops(bwd_chunk_id), "B", self.stage_index - 1)
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch's forward as soon as its input is here."""
        self._await("F", fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch's backward as soon as its output's gradients are here."""
        self._await("B", bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _post(self) -> None:
        """Post all receives of this run, once: the stage has its buffers only after the schedule has begun."""
        if self._posted is not None:
            return
        self._posted = {}
        for part in range(self._parts):
            if self._is_elsewhere(self.stage_index - 1):
                ops = super().get_fwd_recv_ops(part)
                self._posted["F", part] = [_received(op, self._tag("F", self.stage_index - 1)) for op in ops]
            if self._is_elsewhere(self.stage_index + 1):
                ops = super().get_bwd_recv_ops(part)
                self._posted["B", part] = [_received(op, self._tag("B", self.stage_index)) for op in ops]

    def _is_elsewhere(self, stage: int) -> bool:
        """Tell whether there is such a stage, in another process: within one, a schedule hands tensors on itself."""
        return 0 <= stage < self.num_stages and self.stage_index_to_group_rank[stage] != self.group_rank

    def _await(self, kind: str, part: int) -> None:
        self._post()
        assert self._posted is not None
        _wait(self._posted.pop((kind, part), []))

    def _send(self, ops: list[dist.P2POp], kind: str, boundary: int) -> None:
        while len(self._sent) >= _UNDER_WAY:
            _wait(self._sent.popleft())
        tag = self._tag(kind, boundary)
        self._sent.append([op.op(op.tensor, group=op.group, tag=tag, group_dst=op.group_peer) for op in ops])

    def _tag(self, kind: str, boundary: int) -> int:
        """Return a number for one direction over one boundary: two processes may have several in common.

        A forward without a backward has its own: where one process evaluates while another trains, each waits for
        what does not come, and says so. Tag 0 is of what torch's schedules ask one another before their first run.
        """
        return 3 * boundary + (2 if kind == "B" else 1 if self.has_backward else 3)


def _received(op: dist.P2POp, tag: int) -> dist.Work:
    work: dist.Work = op.op(op.tensor, group=op.group, tag=tag, group_src=op.group_peer)
    return work


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
