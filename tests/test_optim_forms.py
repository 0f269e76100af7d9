"""Trainers whose optimizer state is exact or compact: bytes, resuming, other forms, replanning, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch
from pipelines import trainer as trainer_of
from torch import nn

from spu import ModelParallelTrainer
from spu.common.tracker import MemoryTracker
from spu.engine.counted import state_bytes
from spu.memory.spill import _Spill, spilled
from spu.ops import masters
from spu.optim.adamw import AdamW
from spu.optim.forms import FORMS, in_form, is_ours
from spu.settings import STATES

NARROW = [state for state in STATES if state != "fp32"]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(width: int = 64, **settings: Any) -> ModelParallelTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
    return trainer_of(model, 2, **{"precision": "fp16", "microbatches": 2, "lr": 3e-3} | settings)


def optimizers(trainer: ModelParallelTrainer) -> list[AdamW]:
    return [optimizer for optimizer in trainer._runner.updater.optimizers if isinstance(optimizer, AdamW)]


def losses(trainer: ModelParallelTrainer, steps: int) -> list[float]:
    return [float(trainer.step(*batch()).loss) for _ in range(steps)]


def test_every_setting_has_a_form() -> None:
    assert list(FORMS) == list(STATES)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("state", NARROW)
def test_a_trainer_keeps_its_state_in_the_form(state: str, precision: str) -> None:
    with make(state=state, precision=precision) as trainer:
        narrow = losses(trainer, 12)
        for optimizer in optimizers(trainer):
            for parameter, kept in optimizer.state.items():
                layout = optimizer.state_layout(parameter)
                assert {key: (value.shape, value.dtype) for key, value in kept.items() if key != "step"} == layout
                assert ("correction" in layout) == (precision != "fp32")
                assert layout["exp_avg"][1] == torch.uint8
    with make(precision=precision) as trainer:
        wide = losses(trainer, 12)
    if state == "exact":
        assert narrow[0] == wide[0]
    assert narrow[-1] < 0.8 * narrow[0]
    assert narrow[-1] == pytest.approx(wide[-1], rel=0.05)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_exact_master_alone_gives_the_losses_of_fp32_masters(precision: str) -> None:
    """Weights of fp16 below 2**-16, and ties of bf16, are too few here to be met."""
    found = []
    for factory in (AdamW, functools.partial(AdamW, lr=3e-3, master="16bit")):
        with make(precision=precision, optimizer=factory) as trainer:
            found.append(losses(trainer, 20))
    assert found[0] == found[1]


@pytest.mark.parametrize("state", STATES)
def test_the_plan_counts_the_form(state: str) -> None:
    with make(width=256, state=state) as trainer:
        planned = sum(stage.state_bytes for stage in trainer.prepare(*batch()).stages)
        trainer.step(*batch())
        built = trainer._runner.built
        held = sum(state_bytes(built, trainer._runner.updater.optimizers, [0, 1]))
        count = sum(parameter.numel() for owned in built.owned for parameter in owned.values())
    # 64 bytes at most are added to the scales of each moment, and 4 for a step number
    assert 0 <= held - (planned - 4 * count) <= 6 * (2 * 68 + 4)
    assert held / count == pytest.approx({"fp32": 14, "exact": 6.125, "compact": 5.125}[state], rel=0.01)


@pytest.mark.parametrize("state", NARROW)
def test_masters_are_joined_one_at_a_time(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, its loading and the trained model took 4 to 8 bytes a parameter beside all that a plan counts, and
    60 bytes for each value of the largest weight."""
    monkeypatch.setattr(masters, "_PIECE", 4096)
    model = nn.Sequential(nn.Linear(6, 256), *(nn.Linear(256, 256) for _ in range(11)), nn.Linear(256, 4))
    largest = 4 * 256**2
    with trainer_of(model, 1, precision="bf16", microbatches=2, lr=3e-3, state=state) as trainer:
        trainer.step(*batch())
        taken = {"save": functools.partial(trainer.save, tmp_path / "checkpoint"), "take": trainer.state_dict_for_model}
        taken["load"] = functools.partial(trainer.load, tmp_path / "checkpoint")
        for what, work in taken.items():
            with MemoryTracker() as tracker:
                work()
            kept = {"save": 0, "take": 12, "load": 6}[what]  # the model; moments that replace the old ones
            assert tracker.tally.peak < (kept + 3) * largest, what
        made: list[int] = []
        new = _Spill._new
        monkeypatch.setattr(_Spill, "_new", lambda self, *of: made.append(1) or new(self, *of))
        with spilled(tmp_path / "spill", least_bytes=largest):
            trainer.state_dict_for_model()
        assert len(made) == 11, "beside a disk, the trained model is in files"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("state", NARROW)
def test_a_run_resumes_bit_for_bit(state: str, precision: str, tmp_path: Path) -> None:
    with make(state=state, precision=precision) as trainer:
        losses(trainer, 3)
        trainer.save(tmp_path / "checkpoint")
        full = trainer.state_dict_for_model()
        expected = losses(trainer, 5)
    with make(state=state, precision=precision) as trainer:
        losses(trainer, 1)
        trainer.load(tmp_path / "checkpoint")
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, full[name], name)
            assert value.dtype == torch.float32
        assert losses(trainer, 5) == expected


@pytest.mark.parametrize(
    ("saved", "loaded"), [("fp32", "exact"), ("exact", "fp32"), ("compact", "exact"), ("exact", "compact")]
)
def test_a_run_resumes_in_another_form(saved: str, loaded: str, tmp_path: Path) -> None:
    with make(state=saved) as trainer:
        losses(trainer, 3)
        trainer.save(tmp_path / "checkpoint")
        full = trainer.state_dict_for_model()
        expected = losses(trainer, 5)
    with make(state=loaded) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        for name, value in trainer.state_dict_for_model().items():
            # fp16 with 8 bits: 18 mantissa bits; with 16 below 2**-16: a multiple of 2**-40
            tolerance = {"rtol": 2.0**-19, "atol": 2.0**-33} if loaded == "compact" else {"rtol": 0, "atol": 2.0**-40}
            torch.testing.assert_close(value, full[name], **tolerance)
        assert losses(trainer, 5) == pytest.approx(expected, rel=0.02)
        for optimizer in optimizers(trainer):
            for parameter, kept in optimizer.state.items():
                assert set(kept) == {"step", *optimizer.state_layout(parameter)}


def test_weights_that_a_second_trainer_takes_over_keep_their_masters() -> None:
    with make(state="exact") as first:
        losses(first, 3)
        full = first.state_dict_for_model()
        second = trainer_of(first._parts.given, 1, precision="fp16", microbatches=2, lr=3e-3, state="compact")
        with second:
            second.prepare(*batch())
            for name, value in second.state_dict_for_model().items():
                torch.testing.assert_close(value, full[name], rtol=2.0**-19, atol=2.0**-33)


def test_other_optimizers_are_refused_by_name() -> None:
    for factory, name in ((torch.optim.SGD, "SGD"), (functools.partial(torch.optim.Adam, lr=1.0), "Adam")):
        with pytest.raises(ValueError, match=f"state='exact' is a form of spu.optim.AdamW's state, .* is {name}: give"):
            make(state="exact", optimizer=factory)
    with pytest.raises(
        ValueError, match="state='compact' is moments='int8', but the optimizer was given moments='bf16'"
    ):
        make(state="compact", lr=None, optimizer=functools.partial(AdamW, moments="bf16"))
    with pytest.raises(ValueError, match="the optimizer is <lambda>"):
        in_form(lambda params: AdamW(params), None, "exact")


def test_a_partial_keeps_its_own_settings() -> None:
    class Own(AdamW):
        pass

    factory = in_form(functools.partial(Own, lr=0.5, betas=(0.1, 0.2), moments="int8"), None, "exact")
    assert is_ours(factory)
    made = factory([nn.Parameter(torch.ones(2).half())])
    assert isinstance(made, Own)
    assert (made.master_form, made.moments, made.param_groups[0]["lr"]) == ("16bit", "int8", 0.5)
    made = in_form(None, 0.25, "compact")([nn.Parameter(torch.ones(2).half())])
    assert (type(made), made.master_form, made.param_groups[0]["lr"]) == (AdamW, "8bit", 0.25)
    given = functools.partial(AdamW, moments="bf16")
    assert in_form(given, None, "fp32") is given
