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
