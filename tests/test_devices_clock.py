"""Marks of cards, read on the host's scale; host and card of these tests have clocks that move when they are told."""

from __future__ import annotations

import time

import pytest
import torch

from spu.devices.clock import Elapsed, Reading, mark

CARD = torch.device("cuda:0")
HOST = torch.device("cpu")


class Machine:
    """A host, and a card's queue: work is handed over at once and done one piece after the other. The card's clock
    starts anywhere.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.done_at = 0.0  # when all work handed over will have been done, on the host's clock

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.done_at = max(self.done_at, self.now) + seconds

    def event(self, **_: object) -> Event:
        return Event(self)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self, stream: object) -> None:
        self.at = max(self.machine.done_at, self.machine.now)

    def synchronize(self) -> None:
        self.machine.now = max(self.machine.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert max(self.at, other.at) <= self.machine.now, "CUDA refuses an event that is not reached yet"
        return 1e3 * (other.at - self.at)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
    monkeypatch.setattr("spu.devices.clock.time", made)
    return made


def test_a_cpus_mark_is_the_hosts_time() -> None:
    before = time.perf_counter()
    moment = mark(HOST)
    assert isinstance(moment, float)
    assert before <= Reading().seconds(moment, HOST) == moment <= time.perf_counter()


def test_a_cards_work_is_timed_by_the_card(machine: Machine) -> None:
    machine.work(2.0)
    begin = mark(CARD)
    machine.work(0.5)
    middle = mark(CARD)
    machine.now += 1.0
    machine.work(0.25)
    end = mark(CARD)
    assert machine.now == 1001.0, "handing work over does not wait for it"
    reading = Reading()
    times = [reading.seconds(moment, CARD) for moment in (begin, middle, end)]
    assert times == pytest.approx([1002.0, 1002.5, 1002.75], abs=1e-6)  # on the host's scale
    machine.now += 100.0
    assert reading.seconds(middle, CARD) == pytest.approx(1002.5, abs=1e-6)


def test_a_step_counts_from_when_its_card_is_free(machine: Machine) -> None:
    """Without waits the host hands a step over while the card is still at the last one."""
    machine.work(6.0)
    begin = [mark(CARD), mark(HOST)]
    machine.work(3.0)
    elapsed = Elapsed([CARD, HOST], begin, [mark(CARD), mark(HOST)])
    assert elapsed.seconds == pytest.approx(3.0, abs=1e-6)
