"""One test for each bug that was found and fixed, with its story in a line."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, devices, model_of
from pipelines import trainer as trainer_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from spu import ModelParallelTrainer, StageError

pytestmark = pytest.mark.usefixtures("one_thread")
make = functools.partial(trainer_of, microbatches=2)


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


# The loss, evaluation, what crosses stages


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
