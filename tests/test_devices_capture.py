"""A capture that is spoilt leaves no trace in the thread or in the allocator. torch's graphs are stand-ins that fail as
its own do (``torch.cuda.graph.__exit__``: the stream is put back only where the capture could be ended).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spu.common import torch_private
from spu.devices.capture import CudaCapture

CARD, POOL = torch.device("cuda", 1), (0, 7)


class Card:
    """The thread's stream, and the pools that the allocator captures into."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.ended = "default", list[Any](), list[Any]()

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        return Graph(self, pool, stream)

    def end_pool(self, device: int, pool: Any) -> None:
        if pool not in self.capturing:
            raise RuntimeError("not currently recording to mempool_id")
        self.capturing.remove(pool)
        self.ended.append((device, pool))


class Graph:
    def __init__(self, card: Card, pool: Any, stream: Any) -> None:
        self.card, self.pool, self.stream, self.spoilt = card, pool, stream, False

    def __enter__(self) -> None:
        self.before, self.card.stream = self.card.stream, self.stream
        self.card.capturing.append(self.pool)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError):  # the body has waited for the card, say
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.card.capturing.remove(self.pool)
        self.card.stream = self.before


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", made.entered)
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch_private, "end_pool", made.end_pool)
    return made


def test_a_capture_that_succeeds(card: Card) -> None:
    streams: list[Any] = []
    replay = CudaCapture(CARD).record(lambda: streams.append(card.stream), [])
    assert replay() is None
    assert [stream.device for stream in streams] == [CARD]
    assert (card.stream, card.capturing, card.ended) == ("default", [], [])


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), TypeError("mine")])
def test_a_capture_that_fails_leaves_the_thread_in_its_own_stream(card: Card, error: Exception) -> None:
    """The microbatches after it ran eagerly in the capture's stream, unordered with the optimizer's in the default
    one; and the allocator, still in the capture, took no memory back that side streams had used.
    """

    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        CudaCapture(CARD).record(work, [])
    assert (card.stream, card.capturing) == ("default", [])
    assert card.ended == ([(1, POOL)] if isinstance(error, RuntimeError) else [])  # torch has ended the other one


def test_all_captures_of_a_stage_are_in_one_stream(card: Card) -> None:
    """Each stream that multiplies has workspaces of cuBLAS, which torch keeps when the graph is gone."""
    streams: list[Any] = []
    make = CudaCapture.maker(CARD)
    for _ in range(3):
        made = make()
        for _ in range(2):
            made.record(lambda: streams.append(card.stream), [])
    assert len(streams) == 6
    assert len({id(stream) for stream in streams}) == 1
