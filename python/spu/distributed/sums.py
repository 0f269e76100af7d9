"""Gradients added up over pipelines side by side while the last backward still runs.

Parameters lie in buckets, in the order in which a backward comes to them. A bucket leaves as soon as each of its
gradients is complete and the buckets before it have left. Buckets and their order depend on the parameters' sizes
alone, so sums are the same bits whatever the timing. What leaves is a copy: if a gradient changes afterwards (a layer
that runs twice in one backward), the processes tell one another, and its bucket goes once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge

from spu.common import torch_private
from spu.distributed.grad_wire import WIRES, Sending

__all__ = ["GradientSums"]

_SMALLEST, _LARGEST = 2**20 // 4, 25 * 2**20 // 4  # elements; DistributedDataParallel's first bucket, and its others
_COUNT = 8
"""Buckets of a small model: the last one, which nothing hides, is an eighth of it."""


@dataclass
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        missing: ids of those whose gradient is not complete.
        sent: the gradients that have left, each with its version.
        sending: on its way; None: has not left.
    """

    parameters: list[nn.Parameter]
    missing: set[int] = field(default_factory=set)
    sent: list[tuple[torch.Tensor | None, int]] = field(default_factory=list)
    sending: Sending | None = None


class GradientSums:
    """Adds up gradients over the processes that have the same stages.

    Args:
        group: these processes.
        wire: the form in which gradients cross: see `spu.distributed.grad_wire`.
    """

    def __init__(self, group: dist.ProcessGroup, wire: str = "fp32") -> None:
        self._group, self._wire = group, WIRES[wire]
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._again: set[int] = set()  # ids of parameters that got more after they seemed complete
        self._left: dict[int, int] = {}

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
            bucket.missing = {id(p) for p in bucket.parameters}
        self.cancel()
        self._left = dict.fromkeys(stages, backwards)

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
        # Hooks of nodes, not of parameters: they run when torch, or a fused op, has added to the gradient. A parameter
        # does not keep its node.
        nodes = [(id(p), get_gradient_edge(p).node) for p in parameters if at_once and p.requires_grad]
        handles = [node.register_hook(partial(self._complete, key)) for key, node in nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for parameter in parameters:
            if id(parameter) in self._bucket_of and id(parameter) in self._bucket_of[id(parameter)].missing:
                self._complete(id(parameter))

    def _complete(self, key: int, *_: object) -> None:
        """Note that a parameter's gradient gets nothing more, and send what can leave."""
        bucket = self._bucket_of.get(key)
        if bucket is None or key in self._again:
            return
        if key not in bucket.missing:
            self._again.add(key)  # from the next step on its bucket waits for the end
            bucket.sent = []
        bucket.missing.discard(key)
        for each in self._buckets:
            if each.sending is None:
                if each.missing:
                    break
                self._send(each)

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        gradients = [parameter.grad for parameter in bucket.parameters]
        bucket.sent = [(grad, -1 if grad is None else torch_private.version(grad)) for grad in gradients]
        flat = torch.cat(
            [
                torch.zeros(p.numel(), device=p.device) if grad is None else grad.reshape(-1)
                for p, grad in zip(bucket.parameters, gradients)
            ]
        )
        bucket.sending = self._wire(flat, self._group)

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
        parameters = [p for bucket in self._buckets for p in bucket.parameters]
        facts = [p.grad is not None for p in parameters] + [_changed(bucket) for bucket in self._buckets]
        told = torch.tensor([float(fact) for fact in facts], device=parameters[0].device)
        dist.all_reduce(told, group=self._group)
        counts = told.tolist()
        for bucket, changed in zip(self._buckets, counts[len(parameters) :], strict=True):
            assert bucket.sending is not None
            if changed:
                self._again |= {
                    id(p) for p, (grad, version) in zip(bucket.parameters, bucket.sent) if _differs(p, grad, version)
                }
                bucket.sending.sum()  # its memory is free then
                self._send(bucket)
        for bucket in self._buckets:
            assert bucket.sending is not None
            bucket.sending.half_way()
        used = dict(zip(map(id, parameters), counts))
        for bucket in self._buckets:
            assert bucket.sending is not None
            _give(bucket.parameters, bucket.sending.sum(), used)
        self.cancel()

    def cancel(self) -> None:
        """Forget what is on its way."""
        for bucket in self._buckets:
            bucket.sending, bucket.sent = None, []


def _give(parameters: Sequence[nn.Parameter], flat: torch.Tensor, used: dict[int, float]) -> None:
    """Make parts of a sum the parameters' gradients."""
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        if not used[id(parameter)]:
            continue
        value = part.view(parameter.shape)
        if parameter.grad is None:
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        if parameter.grad is None or parameter.grad.is_contiguous():
            parameter.grad = value
        else:  # laid out by the user or by torch: it stays
            parameter.grad.copy_(value)


def _differs(parameter: nn.Parameter, grad: torch.Tensor | None, version: int) -> bool:
    return parameter.grad is not grad or (grad is not None and torch_private.version(grad) != version)


def _changed(bucket: _Bucket) -> bool:
    """Tell whether a gradient of a bucket is another one than that which has left."""
    return not bucket.sent or any(
        _differs(p, grad, version) for p, (grad, version) in zip(bucket.parameters, bucket.sent, strict=True)
    )


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
