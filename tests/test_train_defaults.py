"""Defaults of a new run: how a step is cut and ordered where the user does not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spu.devices.manager import Device
from spu.train import defaults
from spu.train.config import TrainConfig
from spu.train.defaults import LEAST_TOKENS, with_defaults

TWO = {"devices": "cpu:0,cpu:1"}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spu.devices.manager.usable_cores", lambda: [0, 1])
    monkeypatch.setattr("spu.devices.manager.effective_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(
    ("given", "microbatches", "schedule"),
    [
        ({}, 2, "zb"),  # the main job: 8 x 128 tokens
        (TWO, 2, "zb"),
        ({**TWO, "batch": 4}, 2, "zb"),  # fewer tokens, but one for each device
        ({**TWO, "batch": 1}, 1, "zb"),
        ({**TWO, "batch": 12}, 3, "zb"),
        ({**TWO, "batch": 7, "seq": 512}, 7, "zb"),
        ({**TWO, "batch": 7}, 2, "zb"),  # 7 is no multiple, but a device each
        ({**TWO, "seq": 2048}, 8, "zb"),
        ({**TWO, "batch": 64, "seq": 2048}, 8, "zb"),
        ({**TWO, "batch": 16, "accumulate": 2}, 2, "zb"),
        ({"devices": "cpu"}, 2, "1f1b"),
        ({"devices": "cpu", "batch": 4}, 1, "1f1b"),
        ({**TWO, "precision": "fp32"}, 2, "1f1b"),
        ({**TWO, "precision": "bf16"}, 2, "zb"),
        ({**TWO, "lora": 4}, 2, "1f1b"),
        ({**TWO, "budget": "cpu=1GB"}, 2, "1f1b"),
        ({**TWO, "virtual": 2, "schedule": "interleaved"}, 2, "interleaved"),
        ({**TWO, "residency": "streamed", "budget": "cpu=1GB"}, 2, "1f1b"),
        ({"batch": 4, "budget": "cpu=1GB"}, 2, "1f1b"),
        ({"batch": 4, "budget": "cpu=1GB,disk=/tmp:9GB"}, 1, "1f1b"),  # one device, with all cores
        ({"batch": 4, "budget": "cpu=1GB,disk=/tmp:9GB", "residency": "resident"}, 2, "1f1b"),
    ],
)
def test_cpus_get_few_microbatches_and_no_bubble(given: dict[str, Any], microbatches: int, schedule: str) -> None:
    config = TrainConfig(**with_defaults(given))
    assert (config.microbatches, config.schedule) == (microbatches, schedule)
    assert config == TrainConfig(**with_defaults(given)), "the same command makes the same run"


def test_what_is_given_stays() -> None:
    given = {"microbatches": 8, "schedule": "gpipe", "seq": 64}
    assert with_defaults(given) == given
    assert with_defaults({"microbatches": "auto", "schedule": "auto"}) == {"microbatches": "auto", "schedule": "auto"}


def test_beside_a_gpu_there_are_eight_or_as_many_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda:0", torch.device("cuda", 0), (), 1, 8 << 30, 8 << 30, "")
    monkeypatch.setattr(defaults.DeviceManager, "get_devices", lambda self, spec: [gpu, gpu])
    assert with_defaults({}) == {"microbatches": 8}
    assert with_defaults({"batch": 3}) == {"batch": 3, "microbatches": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": "tpu"}, "unknown device 'tpu'"),
        ({"batch": 2, "accumulate": 4}, "--batch 2 has fewer sequences"),
        ({"budget": "cpu=lots"}, "cpu=lots"),
        ({"seq": 0}, "--seq 0"),
    ],
)
def test_what_is_wrong_is_said_as_without_defaults(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_defaults(given)


def test_the_rule_is_the_one_that_the_help_names() -> None:
    (about,) = (f.metadata["kind"].about for f in TrainConfig.own_first() if f.name == "microbatches")
    assert f"of {LEAST_TOKENS} tokens or more" in about


def test_several_processes_have_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    given = {"engine": "distributed", "replicas": 2, "batch": 16, "seq": 16}
    assert with_defaults(given) == {"microbatches": 4, "schedule": "zb", **given}
