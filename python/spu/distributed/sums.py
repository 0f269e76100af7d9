"""Gradients added up over pipelines side by side while the last backward still runs.

Parameters lie in buckets, in the order in which a backward comes to them. A bucket leaves as soon as each of its
gradients is complete and the buckets before it have left. Buckets and their order depend on the parameters' sizes
alone, so sums are the same bits whatever the timing. What leaves is a copy: if a gradient changes afterwards (a layer
that runs twice in one backward), the processes tell one another, and its bucket goes once more. Without a copy that
would have no answer: an all-reduce in place loses what a process had before it.

What tells that a gradient is complete is a hook on the node that adds to it. Where a step has few backwards, nodes and
hooks stay over the steps; a node that is no longer its parameter's is let go of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from spu.common import torch_private
from spu.distributed.collectives import summed
from spu.distributed.grad_wire import WIRES, Sending

__all__ = ["GradientSums", "Sums"]

_SMALLEST, _LARGEST = 2**20 // 4, 25 * 2**20 // 4  # elements; DistributedDataParallel's first bucket, and its others
_COUNT = 8
"""Buckets of a small model: the last one, which nothing hides, is an eighth of it."""

_KEPT = 8
"""Backwards of a step up to which hooks stay: each backward then costs a tenth of what it costs to hang them anew."""


@dataclass
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        missing: ids of those whose gradient is not complete.
        sent: the gradients that have left.
        versions: theirs, as they left.
        stale: one of them has got more since.
        sending: on its way; None: has not left.
    """

    parameters: list[nn.Parameter]
    missing: set[int] = field(default_factory=set)
    sent: list[torch.Tensor | None] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    stale: bool = False
    sending: Sending | None = None

    def __post_init__(self) -> None:
        self.keys = frozenset(map(id, self.parameters))
        self.sizes = [p.numel() for p in self.parameters]


class Sums(Protocol):
    """What adds up gradients over the processes that have the same stages: see `GradientSums`."""

    def begin(self, stages: dict[int, list[nn.Parameter]], late: Collection[int], backwards: int) -> None:
        """Begin a step."""

    def backward(
        self, stage: int, parameters: Sequence[nn.Parameter], *, at_once: bool = True
    ) -> AbstractContextManager[None]:
        """Return a context for a backward of a stage."""

    def end(self) -> None:
        """Give every parameter the sum."""

    def cancel(self) -> None:
        """Forget a step that failed."""

    def close(self) -> None:
        """Let go of what was kept between steps."""

    def under_way(self) -> bool:
        """Tell whether something of a step that failed is still on its way."""

    def let_go(self) -> None:
        """Keep the group no more; nothing is added up afterwards."""


class GradientSums:
    """Adds up gradients over the processes that have the same stages, over their transport.

    Args:
        group: these processes.
        wire: the form in which gradients cross: see `spu.distributed.grad_wire`.
    """

    def __init__(self, group: dist.ProcessGroup, wire: str = "fp32") -> None:
        self._group, self._wire = group, WIRES[wire]
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._next = 0  # the first bucket that has not left during a backward
        self._lost: list[Sending] = []  # on their way when their step failed
        self._again: set[int] = set()  # ids of parameters that got more after they seemed complete
        self._left: dict[int, int] = {}
        self._nodes: dict[int, tuple[Any, RemovableHandle]] = {}  # that add to gradients, and our hook, by parameter id
        self._keeps = True  # nodes and hooks, from step to step
        self._watching: list[Callable[[int], None]] = []  # what the hooks call: nothing but in last backwards

    def begin(self, stages: dict[int, list[nn.Parameter]], late: Collection[int], backwards: int) -> None:
        """Begin a step.

        Args:
            stages: the parameters that each stage of this process trains, stages in order: the same ones every step.
            late: ids of those whose gradient is complete only after all backwards.
            backwards: of each stage in this step.
        """
        if not self._buckets:
            parameters = [p for own in stages.values() for p in own][::-1]
            early = [p for p in parameters if id(p) not in late]
            last = [p for p in parameters if id(p) in late]
            self._buckets = [*_buckets(early), *_buckets(last)]
            self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
            self._again = set(late)
        for bucket in self._buckets:
            bucket.missing = set(bucket.keys)
        self.cancel()
        self._left, self._keeps = dict.fromkeys(stages, backwards), backwards <= _KEPT

    def backward(
        self, stage: int, parameters: Sequence[nn.Parameter], *, at_once: bool = True
    ) -> AbstractContextManager[None]:
        """Return a context for a backward of a stage; during the step's last one, full buckets leave.

        Args:
            stage: its index.
            parameters: the stage's.
            at_once: autograd computes every gradient inside; else they are complete at its end.
        """
        left = self._left[stage] = self._left.get(stage, 0) - 1
        return nullcontext() if left else self._last(parameters, at_once)

    @contextlib.contextmanager
    def _last(self, parameters: Sequence[nn.Parameter], at_once: bool) -> Iterator[None]:
        if at_once:
            for parameter in parameters:
                if id(parameter) not in self._nodes and parameter.requires_grad:
                    self._watch(parameter)
            self._watching.append(self._complete)
        try:
            yield
        finally:
            self._watching.clear()
            if not self._keeps:
                self.close()
        for parameter in parameters:
            key = id(parameter)
            bucket = self._bucket_of.get(key)
            if bucket is not None and key in bucket.missing:
                if at_once:
                    self._check_node(parameter)
                self._complete(key)

    def _watch(self, parameter: nn.Parameter) -> None:
        """Hang a hook on the node that adds to a gradient, and keep the node, which a parameter does not.

        Hooks of nodes, not of parameters: they run when torch, or a fused op, has added to the gradient.
        """
        key, watching = id(parameter), self._watching  # not this object, which has the node

        def seen(*_: object) -> None:
            if watching:
                watching[0](key)

        node = get_gradient_edge(parameter).node
        self._nodes[key] = node, node.register_hook(seen)

    def _check_node(self, parameter: nn.Parameter) -> None:
        """Let go of a node that is no longer the parameter's: it gets another one when its dtype or device changes."""
        node, handle = self._nodes.get(id(parameter), (None, None))
        if handle is not None and not (parameter.requires_grad and get_gradient_edge(parameter).node is node):
            handle.remove()
            del self._nodes[id(parameter)]

    def _complete(self, key: int) -> None:
        """Note that a parameter's gradient gets nothing more, and send what can leave."""
        bucket = self._bucket_of.get(key)
        if bucket is None or key in self._again:
            return
        if key not in bucket.missing:
            self._again.add(key)  # from the next step on its bucket waits for the end
            bucket.stale = True
            return
        bucket.missing.discard(key)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._next += 1
            self._send(self._buckets[self._next - 1])

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        bucket.sent = [parameter.grad for parameter in bucket.parameters]
        bucket.versions = [-1 if grad is None else torch_private.version(grad) for grad in bucket.sent]
        flat = torch.cat(
            [
                torch.zeros(p.numel(), device=p.device, dtype=torch.float32) if grad is None else grad.reshape(-1)
                for p, grad in zip(bucket.parameters, bucket.sent)
            ]
        )
        bucket.sending, bucket.stale = self._wire(flat, self._group), False

    @torch.no_grad()
    def end(self) -> None:
        """Send what has not left, and give every parameter the sum: the same in all processes, to the last bit.

        A parameter that only some of them have used has a gradient in all of them.
        """
        if not self._buckets:
            return
        for bucket in self._buckets:
            if bucket.sending is None:
                self._send(bucket)
        changed = [_changed(bucket) for bucket in self._buckets]
        facts = [p.grad is not None for bucket in self._buckets for p in bucket.parameters]
        facts += [bucket.stale or bool(own) for bucket, own in zip(self._buckets, changed)]
        told = torch.tensor(facts, dtype=torch.float32, device=self._buckets[0].parameters[0].device)
        counts = summed(told, self._group).tolist()
        for bucket, own, anywhere in zip(self._buckets, changed, counts[-len(changed) :], strict=True):
            if anywhere:
                assert bucket.sending is not None
                self._again |= own
                bucket.sending.sum()  # its memory is free then
                self._send(bucket)
        for bucket in self._buckets:
            assert bucket.sending is not None
            bucket.sending.half_way()
        first = 0
        for bucket in self._buckets:
            assert bucket.sending is not None
            last = first + len(bucket.parameters)
            _give(bucket, bucket.sending.sum(), counts[first:last])
            first = last
        self.cancel()

    def cancel(self) -> None:
        """Forget what is on its way."""
        self._next = 0
        for bucket in self._buckets:
            if bucket.sending is not None and not bucket.sending.done():
                self._lost.append(bucket.sending)
            bucket.sending, bucket.sent = None, []

    def under_way(self) -> bool:
        """Tell whether something of a step that failed is still on its way."""
        sending = (bucket.sending for bucket in self._buckets if bucket.sending is not None)
        return not all(each.done() for each in (*self._lost, *sending))

    def let_go(self) -> None:
        """Keep the group no more; nothing is added up afterwards."""
        self.cancel()
        self._lost.clear()
        vars(self).pop("_group", None)

    def close(self) -> None:
        """Take the hooks off, and let go of the nodes."""
        for _, handle in self._nodes.values():
            handle.remove()
        self._nodes.clear()


def _give(bucket: _Bucket, flat: torch.Tensor, used: Sequence[float]) -> None:
    """Make parts of a sum the parameters' gradients, where a process has one."""
    for parameter, part, count in zip(bucket.parameters, flat.split(bucket.sizes), used, strict=True):
        if not count:
            continue
        value, grad = part.view(parameter.shape), parameter.grad
        if grad is None:
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        if grad is None or grad.is_contiguous():
            parameter.grad = value
        else:  # laid out by the user or by torch: it stays
            grad.copy_(value)


def _changed(bucket: _Bucket) -> set[int]:
    """Return ids of the parameters of a bucket whose gradient is another one than that which has left."""
    return {
        id(parameter)
        for parameter, grad, version in zip(bucket.parameters, bucket.sent, bucket.versions, strict=True)
        if parameter.grad is not grad or (grad is not None and torch_private.version(grad) != version)
    }


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[_Bucket]:
    """Yield runs of parameters of about the size that hides a reduction's latency."""
    size = min(max(sum(p.numel() for p in parameters) // _COUNT, _SMALLEST), _LARGEST)
    own: list[nn.Parameter] = []
    for parameter in parameters:
        own.append(parameter)
        if sum(p.numel() for p in own) >= size:
            yield _Bucket(own)
            own = []
    if own:
        yield _Bucket(own)
