"""Settings of a run: checks, learning-rate schedule."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spu.train.config import DEFAULT_MODEL, TrainConfig


def test_defaults_are_valid_and_small_enough_for_five_minutes():
    config = TrainConfig()
    assert config.planned_steps() * config.step_tokens == 786_432
    assert DEFAULT_MODEL["num_hidden_layers"] >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "2f2b"}, "2f2b.*1f1b"),
        ({"precision": "fp8"}, "unknown --precision 'fp8': give one of fp16, bf16, fp32"),
        ({"transfer": "int3"}, "unknown --transfer 'int3': give one of auto, none, fp16, bf16, int8"),
        ({"recompute": "yes"}, "unknown --recompute 'yes': give one of auto, on .True., off"),
        ({"microbatches": 0}, "--microbatches 0 must be a whole number of at least 1"),
        ({"accumulate": -1}, "--accumulate -1"),
        ({"seq": 0}, "--seq 0"),
        ({"steps": 0}, "--steps 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"seed": -1}, "--seed -1"),
        ({"lr": float("nan")}, "--lr nan must be a positive number"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0"),
        ({"init_scale": float("inf")}, "--init-scale inf"),
        ({"minutes": 0.0}, "--minutes 0.0"),
        ({"minutes": 1.0, "steps": 5}, "--steps and --minutes say twice"),
        ({"batch": 4}, "--batch 4 has fewer sequences than --microbatches 8 x --accumulate 1: give --batch 8"),
        ({"batch": 8, "accumulate": 2}, "give --batch 16 or more"),
        ({"lr_schedule": "step"}, "unknown --lr-schedule 'step': give one of cosine, linear, constant"),
        ({"warmup": 1.5}, "--warmup 1.5 must be from 0 to 1"),
        ({"final_lr": -0.1}, "--final-lr -0.1 must be from 0 to 1"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
        ({"epochs": 1, "tokens": 5}, "--tokens and --epochs say twice"),
        ({"keep": 0}, "--keep 0 must be a whole number of at least 1"),
        ({"export": "first"}, "unknown --export 'first': give one of last, best"),
        ({"steps": 5, "tokens": 5}, "--steps and --tokens say twice"),
        ({"batch": 10**9}, r"--batch 1000000000 x --seq 128 is 1.3e\+11 tokens a step: give numbers whose product"),
        ({"seq": 10**8}, r"--batch 8 x --seq 100000000 is 8.0e\+08 tokens a step"),
        ({"batch": 10**5, "microbatches": 10**5}, "cut a step into 100000 parts: give numbers whose product is 4096"),
    ],
)
def test_senseless_settings_are_refused_with_value_and_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrainConfig(), **settings)


def test_steps_come_from_steps_or_tokens_and_wait_for_minutes():
    assert TrainConfig(steps=7).planned_steps() == 7
    assert TrainConfig(tokens=10_000, seq=100, batch=10).planned_steps() == 10
    assert TrainConfig(tokens=1).planned_steps() == 1
    assert TrainConfig(minutes=2.0).planned_steps() is None
    with pytest.raises(ValueError, match="not known yet"):
        TrainConfig(minutes=2.0).lr_factor(0)


def test_json_round_trip():
    config = TrainConfig(steps=3, model="m", lr=0.1)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="'colour' is not a setting"):
        TrainConfig.from_json({**config.to_json(), "colour": "red"})


def test_a_run_of_before_a_setting_was_added_has_its_default():
    values = TrainConfig(steps=3, beta2=0.9).to_json()
    del values["beta2"]
    assert TrainConfig.from_json(values, partly=True) == TrainConfig(steps=3)
