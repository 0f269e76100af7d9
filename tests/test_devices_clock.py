"""Marks of cards, read on the host's scale; a card of these tests is a clock of its own that runs behind."""

from __future__ import annotations

import time

import pytest
import torch

from spu.devices.clock import Elapsed, Reading, mark

CARD = torch.device("cuda:0")
HOST = torch.device("cpu")


class Card:
    """A card's queue: work is handed over at once and done one piece after the other; its clock starts anywhere."""

    def __init__(self, start: float = 1e4) -> None:
        self.shift = start - time.perf_counter()
        self.done_at = 0.0  # when all work so far will have been done, on the host's clock

    def work(self, seconds: float) -> None:
        self.done_at = max(self.done_at, time.perf_counter()) + seconds

    def event(self, **_: object) -> Event:
        return Event(self)


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card

    def record(self, stream: object) -> None:
        self.at = max(self.card.done_at, time.perf_counter()) + self.card.shift

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - self.card.shift - time.perf_counter()))

    def elapsed_time(self, other: Event) -> float:
        assert other.at - self.card.shift <= time.perf_counter(), "CUDA refuses an event that is not reached yet"
        return 1e3 * (other.at - self.at)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
    return made


def test_a_cpus_mark_is_the_hosts_time() -> None:
    before = time.perf_counter()
    moment = mark(HOST)
    assert isinstance(moment, float)
    assert before <= Reading().seconds(moment, HOST) == moment <= time.perf_counter()


def test_a_cards_work_is_timed_by_the_card(card: Card) -> None:
    asked = time.perf_counter()
    begin = mark(CARD)
    card.work(0.05)
    middle = mark(CARD)
    card.work(0.02)
    end = mark(CARD)
    assert time.perf_counter() - asked < 0.03, "handing work over does not wait for it"
    reading = Reading()
    times = [reading.seconds(moment, CARD) for moment in (begin, middle, end)]
    assert times[0] == pytest.approx(asked, abs=0.01)  # on the host's scale
    assert times[1] - times[0] == pytest.approx(0.05, abs=1e-3)
    assert times[2] - times[1] == pytest.approx(0.02, abs=1e-3)


def test_a_step_counts_from_when_its_card_is_free(card: Card) -> None:
    """Without waits the host hands a step over while the card is still at the last one."""
    card.work(0.06)
    begin = [mark(CARD), mark(HOST)]
    card.work(0.03)
    elapsed = Elapsed([CARD, HOST], begin, [mark(CARD), mark(HOST)])
    assert elapsed.seconds == pytest.approx(0.03, abs=5e-3)
