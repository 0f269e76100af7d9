"""One test for each bug that was found and fixed, with its story in a line."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import devices
from torch import nn
from torch.utils.checkpoint import checkpoint

from spu import ModelParallelTrainer, StageError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=generator), torch.randint(4, (rows,), generator=generator)


def make(model: Any, stages: int = 2, precision: str = "fp32", **settings: Any) -> ModelParallelTrainer:
    return ModelParallelTrainer(model, devices(stages), precision=precision, microbatches=2, **settings)


def model_of(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Linear(16, 4))


def assert_plain_gradients(model: nn.Module, stages: int, **settings: Any) -> None:
    """forward_backward gives the plain model's loss and gradients, up to fp32 rounding of the sum of microbatches."""
    plain = copy.deepcopy(model)
    x, y = batch()
    with make(model, stages, **settings) as trainer:
        loss, _ = trainer.forward_backward(x.clone(), y)
    expected = F.cross_entropy(plain(x.clone()), y)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
        )


# Models


def test_a_module_twice_in_a_sequential_runs_twice() -> None:
    """named_children() names a shared activation once: the model lost its second ReLU without a word."""
    relu = nn.ReLU()
    assert_plain_gradients(model_of(relu, nn.Linear(16, 16), relu), 2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_layer_may_change_its_input_in_place(stages: int, recompute: bool) -> None:
    """Layers and stages were fed leaves that want gradients, which autograd does not let anyone change in place."""
    assert_plain_gradients(model_of(nn.LeakyReLU(0.3, inplace=True)), stages, recompute=recompute)


def test_measuring_leaves_the_batch_as_it_was() -> None:
    """measure=True ran the first layer several times on the user's own tensor, also one that changes it in place."""
    x, y = batch()
    before = x.clone()
    with make([nn.LeakyReLU(0.3, inplace=True), nn.Linear(6, 4)], measure=True) as trainer:
        trainer.prepare(x, y)
    assert_equal(x, before)


def test_measuring_tied_layers_runs_each_backward_once() -> None:
    """A layer's measured backward went on into the graph of the layer before, by way of their tied weight."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with make(model, measure=True) as trainer:
        trainer.prepare(*batch())


def test_an_unannounced_change_in_place_is_undone_under_recompute() -> None:
    """The recomputation doubled the doubled input: wrong gradients."""

    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    assert_plain_gradients(model_of(Doubles()), 2, recompute=True)


def test_a_layer_used_in_two_stages_is_trained() -> None:
    """Untying changed the one module object that both stages ran: its parameters belonged to no optimizer."""
    shared = nn.Linear(16, 16)
    model = model_of(shared, nn.Tanh(), shared)
    plain = copy.deepcopy(model)
    weight, before = shared.weight, shared.weight.detach().clone()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    x, y = batch()
    with make(model, 2, lr=0.01) as trainer:
        for _ in range(3):
            loss = trainer.step(x, y).loss
            optimizer.zero_grad()
            expected = F.cross_entropy(plain(x), y)
            expected.backward()
            optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert trainer.plan is not None
        assert 2 <= trainer.plan.stages[0].layers[1] <= 3, "the two uses must be in different stages"
    assert shared.weight is weight
    assert not torch.equal(weight, before)


def test_recompute_counts_a_batch_once_in_running_statistics() -> None:
    """BatchNorm's statistics moved in the forward and again in its recomputation."""
    found = []
    for recompute in (False, True):
        model = model_of(nn.BatchNorm1d(16))
        with make(model, recompute=recompute) as trainer:
            trainer.step(*batch())
        found.append(model[1])
    assert found[0].num_batches_tracked.item() == found[1].num_batches_tracked.item() == 2
    assert_equal(found[0].running_mean, found[1].running_mean)
    assert_equal(found[0].running_var, found[1].running_var)


def test_a_dropout_switched_on_later_is_repeatable() -> None:
    """A layer that drew nothing in its first call drew from the process's generator for ever after."""
    losses = []
    for seed in range(2):
        model = model_of(nn.Dropout(0.0))
        with make(model) as trainer:
            trainer.step(*batch())
            model[1].p = 0.5
            torch.manual_seed(seed)
            losses.append(trainer.step(*batch()).loss)
    assert losses[0] == losses[1]


# Gradients


def test_a_microbatch_without_targets_makes_no_nan() -> None:
    """Multiplying a 0/0 loss by nothing still sent 0 * NaN backward, and the step was skipped."""

    def masked_mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        counted = targets != -100
        return ((outputs.mean(-1) - targets) ** 2 * counted).sum() / counted.sum()

    x, y = batch()
    y[:4] = -100
    model = model_of(nn.Tanh())
    plain = copy.deepcopy(model)
    with make(model, loss_fn=masked_mse) as trainer:
        loss, _ = trainer.forward_backward(x, y)
    expected = masked_mse(plain(x), y)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_inputs_that_want_gradients_get_true_ones() -> None:
    """x.grad came out multiplied by the loss scale."""
    x, y = batch()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model = model_of(nn.LayerNorm(16))
    plain = copy.deepcopy(model)
    with make(model, precision="fp16") as trainer:
        trainer.forward_backward(ours, y)
    F.cross_entropy(plain(theirs), y).backward()
    assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 0.02


def test_a_reentrant_checkpoint_is_refused() -> None:
    """Its inner backward knew no loss scale, and parameters got gradients 65536 times too large."""

    class Reentrant(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    model = model_of(Reentrant(16, 16))
    with make(model, precision="fp16") as trainer:
        with pytest.raises(StageError, match="use_reentrant=False"):
            trainer.step(*batch())
        (model(batch()[0].half()).float().sum()).backward()  # by hand, between steps, it is the user's affair
    assert_plain_gradients(model_of(Reentrant(16, 16)), 2)  # without a scale there is nothing to know


def test_the_hand_run_loop_leaves_nothing_behind() -> None:
    """An output and its bridge held each other through a hook: every step's activations stayed for ever."""
    outputs = []
    trainer = ModelParallelTrainer(devices=devices(2))
    trainer.add_module(nn.Linear(6, 16))
    trainer.add_module(nn.Linear(16, 4))
    for _ in range(10):
        x, y = batch()
        for module in trainer.modules():
            x = module(x.detach().requires_grad_(True).to(module.device))
            outputs.append(weakref.ref(x))
        F.cross_entropy(x, y).backward()
    gc.collect()
    assert sum(output() is not None for output in outputs) <= 2  # the last step's
    trainer.close()


# One model, several trainers


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


def test_a_prepare_that_fails_leaves_the_ties() -> None:
    """An optimizer that could not be made left a model with its tie cut."""

    def no_optimizer(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        raise ArithmeticError("no optimizer today")

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with make(model, optimizer=no_optimizer) as trainer, pytest.raises(ArithmeticError):
        trainer.prepare(*batch())
    assert model[2].weight is model[0].weight


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


# Plans


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


# Half done


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


def test_tensors_in_an_object_that_nobody_looks_into_are_refused_between_stages() -> None:
    """They crossed with their graph: one stage's backward ran through another's layers, in its own thread."""

    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    class Wrap(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return Box(super().forward(x))

    class Unwrap(nn.Module):
        def forward(self, box: Any) -> torch.Tensor:
            return box.tensor

    with (
        make([Wrap(6, 4), Unwrap()]) as trainer,
        pytest.raises((StageError, ValueError), match="hands to the next stage a Box with tensors"),
    ):
        trainer.step(*batch())


def test_a_loss_that_is_a_sum_adds_up() -> None:
    """Its microbatches were weighted as means: a loss eight times too small, without a word."""
    x, y = batch()
    model = model_of(nn.Tanh())
    expected = F.cross_entropy(model(x), y, reduction="sum").item()
    with make(model, loss_fn=nn.CrossEntropyLoss(reduction="sum")) as trainer:
        assert trainer.step(x, y).loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_takes_no_larger_microbatches_than_training() -> None:
    """With accumulation they were several times as large, and needed memory that no plan had counted."""
    rows = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            return x

    with make(model_of(Watch()), accumulate=2) as trainer:
        trainer.step(*batch())
        rows.clear()
        trainer.evaluate(*batch())
    assert set(rows) == {2}
