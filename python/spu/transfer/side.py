"""Packing and copying beside the stages' own work, on a side stream of a GPU.

A GPU computes on its current stream. The copy runs on a stream of its own, which waits for the work enqueued so far on
the current one; the receiver waits for the event at its end. Neither worker waits in between. On a CPU the cores belong
to the stages: a thread beside them would only take turns with them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from spu.common.torch_private import pytree

__all__ = ["GpuSide", "Side", "Ticket", "side_for"]


class Ticket(Protocol):
    """A transfer in progress."""

    def arrive(self, target: torch.device) -> Any:
        """Return the tensors, usable by ``target`` from now on; called on the receiver's thread."""


class Side(Protocol):
    """Runs copies in the order in which they are handed in, beside the work of the thread that hands them in."""

    def start(self, task: Callable[[], Any], given: Any) -> Ticket:
        """Start ``task()``, which makes the tree to send from ``given``, computed or enqueued by this thread."""

    def settle(self) -> None:
        """Keep nothing of what was handed in: the last message of a run has left. Called by the thread that sends."""

    def close(self) -> None:
        """End it; harmless when called twice."""


class _GpuTicket:
    def __init__(self, tree: Any, event: torch.cuda.Event) -> None:
        self._tree, self._event = tree, event

    def arrive(self, target: torch.device) -> Any:
        if target.type != "cuda":
            self._event.synchronize()
            return self._tree
        stream = torch.cuda.current_stream(target)
        stream.wait_event(self._event)
        _used_by(stream, self._tree)
        return self._tree


_LEAVING = 2  # messages that a card still sends while it computes: as planned (`spu.plan.memory.WIRE_BUFFERS`)


def _used_by(stream: torch.cuda.Stream, tree: Any) -> None:
    """Keep the memory of these tensors from reuse until the stream has used them, and the host has seen that."""
    for tensor in _on_cards(tree):
        tensor.record_stream(stream)


def _on_cards(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(tree):
        tensor = getattr(leaf, "wire", leaf)  # of a packet
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            yield tensor


class GpuSide:
    """Side streams of the GPUs at both ends of a link; the copy runs on the first GPU's.

    A copy between two GPUs is ordered with the current streams of both: with a side stream on each, it waits for
    neither's computations and holds neither up.

    What a card sends stays in memory until its computations wait for the end of the copy, two messages later. With
    ``record_stream`` it would until the host has seen that end: the host is far ahead of the card, and most messages of
    a step would be in memory at one time. What arrives is kept so: when its memory is free, the receiver knows.

    Args:
        gpus: at the ends of the link, the sender first.
        computed: the sender is the first GPU, whose current stream computes what is sent. What a CPU sends is there
            when it is handed in: its copy waits for nothing that the receiving GPU has queued.
    """

    def __init__(self, gpus: Sequence[torch.device], *, computed: bool = True) -> None:
        self._gpus, self._computed = list(gpus), computed
        self._streams = [torch.cuda.Stream(gpu) for gpu in self._gpus]
        self._sources: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def start(self, task: Callable[[], Any], given: Any) -> Ticket:
        copying, computing = self._streams[0], torch.cuda.current_stream(self._gpus[0])
        if self._computed:
            copying.wait_stream(computing)
        with contextlib.ExitStack() as streams:
            # The device first: a stream alone, when it is left, makes a context on the thread's own device, and a CPU's
            # worker may have another one.
            streams.enter_context(torch.cuda.device(self._gpus[0]))
            for stream in reversed(self._streams):
                streams.enter_context(torch.cuda.stream(stream))
            tree = task()
            for stream in self._streams[1:]:
                copying.wait_stream(stream)
            event = copying.record_event()
        sources = [tensor.detach() for tensor in _on_cards(given)]
        if sources:
            self._sources.append((event, sources))
            self._let_go(computing, _LEAVING)
        return _GpuTicket(tree, event)

    def settle(self) -> None:
        self._let_go(torch.cuda.current_stream(self._gpus[0]), 0)

    def _let_go(self, computing: torch.cuda.Stream, most: int) -> None:
        """Let the memory of what was sent be used again by computations to come, all but that of so many messages."""
        while len(self._sources) > most:
            computing.wait_event(self._sources.popleft()[0])

    def close(self) -> None:
        pass


def side_for(source: torch.device, target: torch.device) -> Side | None:
    """Return the side of a link from ``source`` to ``target``; None where the sender itself copies: between CPUs, and
    within a device.
    """
    gpus = [end for end in (source, target) if end.type == "cuda"]
    return GpuSide(gpus, computed=source.type == "cuda") if gpus and source != target else None
