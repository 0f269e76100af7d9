"""Signals become a wish to stop, and are what they were afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from spu.train.signals import Stopped, StopSignals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_noted_and_the_second_interrupts(signum, code):
    before = signal.getsignal(signum)
    with StopSignals() as signals:
        assert signals.asked is None
        os.kill(os.getpid(), signum)
        assert signals.asked == signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before
    assert Stopped(signum, "text").code == code
