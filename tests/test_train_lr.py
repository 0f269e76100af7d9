"""Learning rates: warm-up, the three schedules, and what the command line says of them."""

from __future__ import annotations

import itertools
import math

import pytest

from spu.train.config import TrainConfig
from spu.train.lr import LR_SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_and_ends_at_its_last_share(schedule: str) -> None:
    factors = [lr_factor(step, 100, schedule=schedule, warm=10, final=0.2) for step in range(130)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[100:] == [pytest.approx(1.0 if schedule == "constant" else 0.2)] * 30
    falls = [a > b for a, b in itertools.pairwise(factors[10:101])]
    assert not any(falls) if schedule == "constant" else all(falls)


def test_half_way_down() -> None:
    assert lr_factor(55, 100, schedule="linear", warm=10, final=0.2) == pytest.approx(0.6)
    assert lr_factor(55, 100, schedule="cosine", warm=10, final=0.2) == pytest.approx(0.6)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert lr_factor(20, 80, schedule="cosine", final=0.2) == pytest.approx(quarter)
    assert lr_factor(20, 80, schedule="linear", final=0.2) == pytest.approx(0.8)


def test_edges() -> None:
    assert lr_factor(0, 1) == 1.0
    assert lr_factor(0, 1, warm=1) == 1.0
    assert lr_factor(3, 5, warm=10) == 0.4, "a warm-up longer than the run"
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'cos': give one of cosine, linear, constant"):
        lr_factor(0, 1, schedule="cos")


def test_the_settings_of_a_run_decide() -> None:
    steps = TrainConfig(steps=100, warmup_steps=0, lr_schedule="linear", final_lr=0.0)
    assert [steps.lr_factor(k) for k in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert TrainConfig(steps=100, warmup_steps=20).lr_factor(4) == 0.25
    assert TrainConfig(steps=100, warmup=0.2).lr_factor(4) == 0.25
