"""Signals become a wish to stop, and are what they were afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from spu.train.signals import StopSignals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_and_the_second_interrupts(signum):
    before = signal.getsignal(signum)
    with StopSignals() as signals:
        assert signals.asked is None
        os.kill(os.getpid(), signum)
        assert signals.asked == signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before


def test_a_handler_that_was_set_from_c_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` returns None for it, and takes no None: a run that had ended well ended in a TypeError."""
    signals = StopSignals()
    monkeypatch.setattr(signals, "_before", {signal.SIGTERM: None})
    before = signal.getsignal(signal.SIGTERM)
    signals.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGTERM) is before
