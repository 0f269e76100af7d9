"""A test for each fixed bug that took more than one step: several trainers of a model, plans, half-made trainers."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, devices, model_of
from test_regressions import make
from torch import nn

import spu
from spu import ModelParallelTrainer
from spu.memory import spill
from spu.memory.store import StoreError
from spu.nn import is_accelerated

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_second_trainer_does_not_unscale_twice() -> None:
    """The hooks of a dropped trainer stayed on the parameters: gradients were divided by the loss scale once more."""
    model = model_of(nn.LayerNorm(16))
    first = make(model, precision="fp16")
    first.forward_backward(*batch())
    expected = model[1].weight.grad.clone()
    with make(model, precision="fp16") as second:
        second.forward_backward(*batch())
        torch.testing.assert_close(model[1].weight.grad, expected)
        with pytest.raises(RuntimeError, match="another one has taken over"):
            first.step(*batch())
    first.close()


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "alive"])
def test_a_second_trainer_finds_the_ties(keep: bool) -> None:
    """Without close() the model kept the first trainer's aliases: the second saw two independent weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    first = make(model)
    first.forward_backward(*batch())
    expected = model[0].weight.grad.clone()
    if not keep:
        del first
        gc.collect()
        assert model[2].weight is model[0].weight
    with make(model) as second:
        second.forward_backward(*batch())
        assert_equal(model[0].weight.grad, expected)
    assert model[2].weight is model[0].weight
    if keep:
        first.close()


@pytest.mark.parametrize("fails", ["the disk", "the optimizer"])
def test_a_prepare_that_fails_leaves_exact_values_and_the_users_own_fused_layers(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk left rounded weights, from which the next trainer trained; and what the user had fused was undone."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(3)))
    spu.accelerate(model[0])
    exact = [parameter.detach().clone() for parameter in model.parameters()]
    settings: dict[str, Any] = {"residency": "streamed", "tiers": f"disk={tmp_path}:1GB", "loss_fn": nn.MSELoss()}
    x, made = torch.randn(8, 1024), spill._Spill._new

    def optimizer(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        raise StoreError("no room")

    def full(self: Any, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        if model[0].weight.dtype == torch.bfloat16:  # one is converted
            raise StoreError("no room")
        return made(self, shape, dtype)

    with monkeypatch.context() as patch:
        if fails == "the disk":
            patch.setattr(spill._Spill, "_new", full)
        else:
            settings["optimizer"] = optimizer
        with (
            pytest.raises(StoreError, match="no room"),
            ModelParallelTrainer(model, "cpu:0", precision="bf16", **settings) as trainer,
        ):
            trainer.prepare(x, x)
    assert [is_accelerated(layer) for layer in model] == [True, False, False]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for parameter, value in zip(model.parameters(), exact, strict=True):
        assert_equal(parameter, value)


def test_a_prepare_that_fails_leaves_the_ties() -> None:
    """An optimizer that could not be made left a model with its tie cut."""

    def no_optimizer(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        raise ArithmeticError("no optimizer today")

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with make(model, optimizer=no_optimizer) as trainer, pytest.raises(ArithmeticError):
        trainer.prepare(*batch())
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("full", [1, 2, 3])
def test_a_device_without_room_leaves_the_ties_and_shared_modules(full: int) -> None:
    """The next step, after others had made room, trained a weight that was tied no more."""

    class Moves(nn.Linear):
        times = 0

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            Moves.times += 1
            if Moves.times == full:
                raise torch.OutOfMemoryError("no room")
            return super()._apply(fn, recurse)

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        shared = nn.Sequential(Moves(6, 6), nn.Tanh())
        made = nn.Sequential(Moves(6, 6), shared, nn.Linear(6, 6), shared, Moves(6, 6), nn.Linear(6, 6))
        made[5].weight = made[0].weight
        return made

    def losses(own: nn.Sequential, trainer: Any) -> list[float]:
        found = [trainer.step(*batch()).loss for _ in range(2)]
        assert own[5].weight is own[0].weight
        assert own[3] is own[1]
        return found

    own = model()
    with make(own) as trainer:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.prepare(*batch())
        assert own[5].weight is own[0].weight
        found = losses(own, trainer)
    plain = model()
    with make(plain) as trainer:
        assert losses(plain, trainer) == found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replan_without_room_leaves_the_training_as_it_was(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It left a closed trainer, and the moments were gone."""

    class Moves(nn.Linear):
        full: Any = None

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            if Moves.full is self:  # and no copy that is measured
                Moves.full = None
                raise torch.OutOfMemoryError("no room")
            return super()._apply(fn, recurse)

    monkeypatch.setattr("spu.trainer.staged.WORTH", 1e9)  # stages are built again
    found = []
    for fails in (False, True):
        torch.manual_seed(0)
        own = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Moves(6, 6), nn.Linear(6, 6))
        own[3].weight = own[0].weight
        with make(own, precision=precision) as trainer:
            losses = [trainer.step(*batch()).loss for _ in range(2)]
            if fails:
                plan, Moves.full = trainer.plan, own[2]
                with pytest.raises(torch.OutOfMemoryError):
                    trainer.replan()
                assert trainer.plan is plan
            found.append(losses + [trainer.step(*batch()).loss for _ in range(2)])
            assert own[3].weight is own[0].weight
    assert found[0] == found[1]


def test_a_closed_trainer_says_so() -> None:
    """It spoke of futures that cannot be scheduled."""
    trainer = make(model_of())
    trainer.step(*batch())
    trainer.close()
    with pytest.raises(RuntimeError, match="was closed"):
        trainer.step(*batch())
    with pytest.raises(RuntimeError, match="was closed"):
        trainer.evaluate(*batch())


@pytest.mark.parametrize("planned", [False, True])
def test_a_small_batch_may_be_evaluated_first(planned: bool) -> None:
    """Planning for it as for a training batch asked for a row in each of its microbatches."""
    model = model_of(nn.Tanh())
    x, y = batch(1)
    expected = F.cross_entropy(model(x), y).item()
    plan = None
    if planned:
        with make(copy.deepcopy(model)) as trainer:
            plan = trainer.prepare(*batch())
    with make(model, plan=plan) as trainer:
        assert trainer.evaluate(x, y) == pytest.approx(expected, rel=1e-6)
        trainer.step(*batch(2))


@pytest.mark.parametrize(
    "other", [{"schedule": "gpipe"}, {"transfer": "int8"}, {"accumulate": 2}, {"recompute": True}], ids=str
)
def test_a_plan_for_other_settings_is_refused(other: dict[str, Any]) -> None:
    """Its budgets were proven for a schedule, microbatches or a precision that the trainer then did not use."""
    with make(model_of(), **other) as trainer:
        plan = trainer.prepare(*batch())
    with (
        make(model_of(), plan=plan, recompute=False, transfer="none") as trainer,
        pytest.raises(ValueError, match=f"the plan is for {next(iter(other))}="),
    ):
        trainer.step(*batch())
    with make(model_of(), plan=plan, **other) as trainer:
        assert trainer.prepare(*batch()) is plan


def test_a_plan_for_larger_budgets_or_smaller_batches_is_refused() -> None:
    """Only its layers and settings were compared: what it had proven did not hold here."""
    with make(model_of()) as trainer:
        plan = trainer.prepare(*batch())
    small = [dataclasses.replace(device, budget_bytes=100) for device in devices(2)]
    with (
        ModelParallelTrainer(model_of(), small, precision="fp32", microbatches=2, plan=plan) as trainer,
        pytest.raises(ValueError, match=r"the plan needs .* on cpu:0, whose budget is 100 B"),
    ):
        trainer.step(*batch())
    with (
        make(model_of(), plan=plan) as trainer,
        pytest.raises(ValueError, match="the plan is for microbatches of 4 rows, these have 8"),
    ):
        trainer.step(*batch(16))


def test_a_trainer_that_cannot_be_made_gives_the_model_back_in_full_precision() -> None:
    """An optimizer that refused its arguments left a model rounded to fp16, its fp32 values gone."""
    model = model_of(nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    with (
        make(model, precision="fp16", optimizer=lambda parameters: torch.optim.SGD(parameters, rate=1.0)) as trainer,
        pytest.raises(TypeError, match="rate"),
    ):
        trainer.step(*batch())
    for name, value in model.state_dict().items():
        assert_equal(value, before[name], name)
    assert type(model[0]) is nn.Linear


def test_a_second_trainer_goes_on_from_the_first_ones_masters() -> None:
    """Its masters were made from weights that the first trainer had rounded to fp16."""
    model = model_of(nn.Tanh())
    exact = model[0].weight.detach().clone()
    first = make(model, precision="fp16")
    first.prepare(*batch())
    with make(model, precision="fp16") as second:
        second.prepare(*batch())
        assert_equal(second.state_dict_for_model()["0.weight"], exact)
    first.close()
