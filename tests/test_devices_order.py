"""A caller's own stream and the default one, in which a trainer's threads work. The streams are stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import devices

from spu.devices.order import in_callers_order
from spu.engine.local import LocalEngine
from spu.engine.stage import Stage


class Stream:
    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.name, other.name))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Who waits for whom; of two cards the caller uses a stream of its own on the second."""
    found: list[tuple[str, str]] = []
    default = {index: Stream(f"default {index}", found) for index in range(2)}
    current = {0: default[0], 1: Stream("own 1", found)}
    monkeypatch.setattr(torch.cuda, "default_stream", lambda card: default[card.index])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda card: current[card.index])
    return found


def test_a_callers_own_stream_is_waited_for_and_waits(waits: list[tuple[str, str]]) -> None:
    cards = [torch.device("cuda", index) for index in (0, 1, 1)]
    with in_callers_order(cards):
        assert waits == [("default 1", "own 1")]
    assert waits == [("default 1", "own 1"), ("own 1", "default 1")]
    waits.clear()
    with pytest.raises(ValueError, match="in a worker"), in_callers_order(cards):
        raise ValueError("in a worker")
    assert waits == [("default 1", "own 1"), ("own 1", "default 1")]


def test_workers_are_in_the_callers_order(waits: list[tuple[str, str]]) -> None:
    """A caller inside ``with torch.cuda.stream(...)`` raced with the workers for its inputs and its results."""
    (here,) = devices(1)
    engine = LocalEngine([Stage(0, [], here, is_last=True, loss_fn=None)])
    engine._cards = {torch.device("cuda:1")}
    seen: list[Any] = engine.each(lambda stage: list(waits))
    assert seen == [[("default 1", "own 1")]]
    assert waits == [("default 1", "own 1"), ("own 1", "default 1")]
    engine.close()
