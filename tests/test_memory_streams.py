"""Copies beside a card's computations: in which stream, after what, on which card. The card is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from spu.memory.streams import CudaStreams


class Stream:
    def __init__(self, device: torch.device, done: list[Any]) -> None:
        self.device, self._done = device, done

    def wait_event(self, event: Event) -> None:
        self._done.append(("waits", event.number))


class Event:
    made = 0

    def __init__(self, **how: Any) -> None:
        Event.made += 1
        self.number, self.stream = Event.made, None

    def record(self, stream: Any) -> None:
        self.stream = stream


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was entered and waited for, in order."""
    found: list[Any] = []

    @contextmanager
    def entered(what: Any) -> Iterator[None]:
        found.append(what.device if isinstance(what, Stream) else what)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(device, found))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, found))
    return found


def test_a_copy_runs_on_its_card_after_what_it_was_given(done: list[Any]) -> None:
    """A thread whose device is another one would leave a context of hundreds of megabytes there."""
    card = torch.device("cpu")  # a tensor must lie on it
    streams = CudaStreams(card)
    mark = streams.mark()
    into, source = torch.zeros(4), torch.arange(4.0)
    event = streams.copy(into, source, [mark])
    assert done == [("waits", mark.number), card, card]  # type: ignore[attr-defined]
    assert torch.equal(into, source)
    assert event.stream is streams._outward  # type: ignore[attr-defined]


def test_a_copy_from_another_card_is_no_copy_of_these_streams(done: list[Any]) -> None:
    """It would run in a stream of that card, and the event would not tell when it is done."""
    with pytest.raises(AssertionError):
        CudaStreams(torch.device("cpu")).copy(torch.zeros(1), torch.zeros(1, device="meta"))
