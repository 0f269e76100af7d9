"""Names of other libraries and values as people write them, in the messages that refuse them."""

from __future__ import annotations

from typing import Any

import pytest

from spu.common.elsewhere import _NAMES, meant_by, rewritten
from spu.common.options import unknown
from spu.settings import TrainSettings
from spu.train.config import RunOptions, TrainConfig


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "lr"), ("--learning-rate", "lr"), ("per_device_train_batch_size", "batch"),
        ("fp16", "precision"), ("gradient_accumulation_steps", "accumulate"),
        ("gradient_checkpointing", "recompute"), ("max_steps", "steps"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_lead_to_ours(theirs: str, ours: str) -> None:
    known = [*TrainConfig.names(), *RunOptions.names()]
    assert meant_by(theirs, known) == ours
    assert unknown(theirs, known, "an option") == f"{theirs!r} is not an option; did you mean {ours}?"


def test_what_is_not_there_is_not_named() -> None:
    assert meant_by("learning_rate", TrainSettings.names()) is None
    assert meant_by("frobnicate", ["lr"]) is None
    with pytest.raises(TypeError, match=r"'fp16' is not one of its keywords; did you mean precision\?"):
        TrainSettings.given(None, {"fp16": True}, "Trainer")


def test_every_name_leads_to_an_option_once() -> None:
    known = {*TrainConfig.names(), *RunOptions.names()}
    theirs = [name for names in _NAMES.values() for name in names.split()]
    assert set(_NAMES) <= known
    assert len(theirs) == len(set(theirs))
    assert not known.intersection(theirs)


@pytest.mark.parametrize(
    ("value", "kind", "better"),
    [
        ("1e6", "INTEGER", "1000000"), ("1M", "INTEGER", "1000000"), ("2k", "INTEGER|auto", "2000"),
        (8.0, "INTEGER", "8"), ("10,000", "INTEGER", "10000"), ("1.5", "INTEGER", ""), ("many", "INTEGER", ""),
        (True, "INTEGER", ""),
        ("..", "INTEGER", ""), ("1e400", "INTEGER", ""), ("1e30", "INTEGER", ""), (None, "INTEGER", ""),
        (["cpu:0", "cpu:1"], "TEXT", "cpu:0,cpu:1"), ([1, 2], "TEXT", ""), (5, "TEXT", ""), ("1e6", "NUMBER", ""),
    ],
)  # fmt: skip
def test_values_are_written_as_they_are_taken(value: Any, kind: str, better: str) -> None:
    assert rewritten(value, kind) == better


def test_a_refusal_says_what_to_write() -> None:
    with pytest.raises(ValueError, match="--steps '1e3' must be a whole number of at least 1: write 1000$"):
        TrainConfig(steps="1e3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--steps 0 must be a whole number of at least 1$"):
        TrainConfig(steps=0)  # it once went on: write 0
    with pytest.raises(ValueError, match="--seq '-1k' must be a whole number of at least 1$"):
        TrainConfig(seq="-1k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--devices \['cpu:0', 'cpu:1'\] must be a text: write cpu:0,cpu:1$"):
        TrainConfig(devices=["cpu:0", "cpu:1"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_grad_norm 0 must be a positive number; a large one, such as 1e9, clips"):
        TrainSettings(max_grad_norm=0)
