"""Times of calls on a device that runs behind the host; the device of these tests only counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spu.tune.timing import time_call


class Machine:
    """A host that takes ``host`` seconds a call, and a device that takes ``device`` seconds for what it is handed."""

    def __init__(self, host: float, device: float, capturable: bool = True) -> None:
        self.host, self.device, self.capturable = host, device, capturable
        self.calls = self.captured = 0
        self._recording = False
        self._now = self._idle_at = 0.0

    def call(self) -> None:
        self._now += self.host
        if self._recording:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.captured += 1
            return
        self.calls += 1
        self._hand_over(self.device)

    def _hand_over(self, seconds: float) -> None:
        self._idle_at = max(self._idle_at, self._now) + seconds

    def seconds(self, run: Callable[[], object]) -> float:
        self._now = self._idle_at = max(self._now, self._idle_at)
        begin = self._now
        run()
        return self._idle_at - begin

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        self.captured, self._recording = 0, True
        try:
            run()
        finally:
            self._recording = False

        def replay() -> None:
            self._now += 5e-6
            self._hand_over(self.captured * self.device)

        return replay


def test_a_small_kernel_is_timed_and_not_python() -> None:
    machine = Machine(host=40e-6, device=3e-6)
    took = time_call(machine.call, machine)
    assert took.captured
    assert machine.captured == 20
    assert took.device_us == pytest.approx(3.0, rel=0.1)
    assert took.eager_us == pytest.approx(40.0, rel=0.1)


def test_a_long_call_is_captured_fewer_times() -> None:
    machine = Machine(host=40e-6, device=5e-3)
    took = time_call(machine.call, machine)
    assert machine.captured == 10
    assert took.device_us == pytest.approx(5000.0, rel=0.02)
    assert took.eager_us == pytest.approx(5000.0, rel=0.02)


def test_what_cannot_be_captured_is_timed_as_it_runs() -> None:
    took = time_call((machine := Machine(host=40e-6, device=3e-6, capturable=False)).call, machine)
    assert not took.captured
    assert took.device_us == took.eager_us == pytest.approx(40.0, rel=0.1)


def test_an_error_of_the_call_itself_is_raised() -> None:
    machine = Machine(host=1e-6, device=1e-6)

    def fails() -> None:
        raise RuntimeError("out of resources: shared memory")

    with pytest.raises(RuntimeError, match="out of resources"):
        time_call(fails, machine)
