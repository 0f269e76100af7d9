"""What the trainer refuses, and what it says when a stage fails."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from pipelines import batch, devices, layers
from torch import nn

from spu import ModelParallelTrainer, StageError
from spu.plan import BudgetError

pytestmark = pytest.mark.usefixtures("one_thread")


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.at = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ArithmeticError("the third call fails")
        return x * 1.0


def test_a_failure_names_stage_action_and_microbatch_and_the_trainer_goes_on() -> None:
    parts = layers()
    failing = Fails()
    with ModelParallelTrainer([*parts[:2], failing, parts[3]], devices(3), microbatches=4) as trainer:
        trainer.prepare(*batch())
        failing.calls, failing.at = 0, 3
        stage = next(i for i, s in enumerate(trainer.plan.stages) if s.layers[0] <= 2 < s.layers[1])
        with pytest.raises(
            StageError, match=rf"stage {stage} \(cpu:{stage}\), action {stage}F2, microbatch 2.*third call"
        ) as error:
            trainer.step(*batch())
        assert isinstance(error.value.__cause__, ArithmeticError)
        assert error.value.stage == stage
        assert str(error.value.action) == f"{stage}F2"
        assert all(p.grad is None for p in trainer.parameters())
        assert trainer.steps_done == 0
        assert not trainer.step(*batch()).skipped


def test_a_failure_in_backward_stops_everybody() -> None:
    parts = layers()

    class BadBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("no gradient today")

    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return BadBackward.apply(x)

    with (
        ModelParallelTrainer([*parts[:3], Bad(), parts[3]], devices(4), microbatches=4) as trainer,
        pytest.raises(StageError, match=r"B0.*no gradient today"),
    ):
        trainer.step(*batch())


def test_bad_arguments_name_the_value_and_what_there_is() -> None:
    model = nn.Sequential(*layers())
    with pytest.raises(ValueError, match=r"fp8.*fp32"):
        ModelParallelTrainer(model, devices(2), precision="fp8")
    with pytest.raises(ValueError, match=r"dualpipe.*1f1b"):
        ModelParallelTrainer(model, devices(2), schedule="dualpipe")
    with pytest.raises(ValueError, match=r"int3.*int8"):
        ModelParallelTrainer(model, devices(2), transfer="int3")
    with pytest.raises(ValueError, match=r"microbatches.*0"):
        ModelParallelTrainer(model, devices(2), microbatches=0)
    with pytest.raises(ValueError, match="tpu:0"):
        ModelParallelTrainer(model, ["tpu:0"])
    with pytest.raises(TypeError, match="function is no nn.Module"):
        ModelParallelTrainer(lambda x: x, devices(2))
    with pytest.raises(ValueError, match="no layers"):
        ModelParallelTrainer([], devices(2))
    for given in (2, None):
        with pytest.raises(TypeError, match=f"devices is {given}: name them, as in 'cpu:0,cpu:1'"):
            ModelParallelTrainer(model, given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device and has no values"):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2, device="meta")), devices(1))
    with pytest.raises(ValueError, match=r"compiled as a whole.*give the model itself \(compiled\._orig_mod\)"):
        ModelParallelTrainer(torch.compile(model), devices(2))


def test_bad_batches_are_refused_before_anything_runs() -> None:
    x, y = batch()
    with ModelParallelTrainer(nn.Sequential(*layers()), devices(2), microbatches=4) as trainer:
        with pytest.raises(ValueError, match=r"0 rows.*4 microbatches"):
            trainer.step(x[:0], y[:0])
        with pytest.raises(ValueError, match="no target"):
            trainer.step(x, torch.full_like(y, -100))
        with pytest.raises(ValueError, match=r"^targets hold no tensor .*\(ndarray\).*torch.as_tensor"):
            trainer.step(x, y.numpy())
        with pytest.raises(ValueError, match="disagree"):
            trainer.step({"a": x, "b": x[:5]}, y)
        assert trainer.steps_done == 0
    with (
        ModelParallelTrainer(nn.Sequential(*layers()), devices(5), microbatches=2) as trainer,
        pytest.raises(ValueError, match="5 devices for 4 layers"),
    ):
        trainer.step(x, y)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": "adamw"}, "optimizer is 'adamw': give an optimizer's class"),
        ({"loss_fn": "ce"}, "loss_fn is 'ce': give a function of outputs and targets"),
        ({"lr_schedule": 0.5}, "lr_schedule is 0.5: give a function from a step's index"),
        ({"report": True}, "report is True: give a function of text"),
        ({"lr": "1e-3"}, "lr is '1e-3': give a number"),
        ({"plan": 3}, "plan is 3: give a Plan"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "scaler is a GradScaler: give a spu.LossScaler"),
        ({"loss_fn": nn.MSELoss}, "loss_fn is the class MSELoss: give a function of outputs and targets, or a module"),
        ({"lr_schedule": torch.optim.lr_scheduler.StepLR}, "lr_schedule is the class StepLR: give a function from a"),
        ({"tiers": 8}, "tiers is 8: give a text such as 'cpu=32GB"),
        ({"gradient_accumulation_steps": 2}, "is not one of its keywords; did you mean accumulate?"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_arguments_of_another_kind_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        ModelParallelTrainer(nn.Sequential(*layers()), devices(2), **given)


def test_few_rows_in_the_first_batch_are_said() -> None:
    x, y = batch()
    with ModelParallelTrainer(nn.Sequential(*layers()), devices(2), microbatches=4) as trainer:
        with pytest.warns(UserWarning, match=r"the first batch has 3 rows, fewer than 4 microbatches .* lower"):
            trainer.step(x[:3], y[:3])
        trainer.step(x, y)
        assert trainer.steps_done == 2


def test_a_budget_that_is_too_small_is_refused_before_the_model_is_touched() -> None:
    model = nn.Sequential(*layers())
    small = [dataclasses.replace(d, budget_bytes=2000) for d in devices(2)]
    with ModelParallelTrainer(model, small, microbatches=2) as trainer, pytest.raises(BudgetError, match="short"):
        trainer.step(*batch())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_loss_that_is_no_mean_is_refused() -> None:
    with (
        ModelParallelTrainer(
            nn.Sequential(*layers()), devices(2), microbatches=2, loss_fn=lambda out, y: out
        ) as trainer,
        pytest.raises(StageError, match="scalar"),
    ):
        trainer.step(*batch())
