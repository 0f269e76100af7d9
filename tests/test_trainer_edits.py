"""What the user does to the model between steps keeps its meaning: training goes on from there, or refuses by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, mlp
from pipelines import trainer as trainer_of
from torch import nn

from spu import StageError, ops

pytestmark = pytest.mark.usefixtures("one_thread")
make = functools.partial(trainer_of, precision="bf16", microbatches=2, lr=1e-4)


# Values


def load(model: nn.Module) -> None:
    model.load_state_dict({name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()})


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.01, 0.01)


def fill_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(0.5)  # leaves no trace in a version counter


def give_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, -0.5)


@pytest.mark.parametrize("edit", [load, clamp, fill_data, give_data])
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD], ids=["ours", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_weights_that_were_changed_between_steps_are_trained_on(
    precision: str, optimizer: Any, edit: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """The next update wrote the fp32 master over them, and save() and state_dict_for_model() gave the old values."""
    model = mlp()
    with make(model, precision=precision, optimizer=optimizer) as trainer:
        trainer.step(*batch())
        edit(model)
        edited = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value.to(edited[name].dtype), edited[name], name)
        trainer.save(tmp_path / "checkpoint")
        trainer.step(*batch())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value.float(), edited[name].float(), atol=1e-3, rtol=5e-3)
    fresh = mlp()
    with make(fresh, precision=precision, optimizer=optimizer) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        for name, value in fresh.state_dict().items():
            assert_equal(value, edited[name], name)


def test_what_was_not_changed_keeps_its_low_bits() -> None:
    """Weights set to averaged ones for an evaluation, and back."""
    model = mlp()
    with make(model, lr=1e-3) as trainer:
        for _ in range(3):
            trainer.step(*batch())
        exact = trainer.state_dict_for_model()
        assert not torch.equal(exact["0.weight"], model[0].weight.float())
        kept = copy.deepcopy(model.state_dict())
        fill_data(model)
        trainer.evaluate(*batch())
        model.load_state_dict(kept)
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, exact[name], name)
        model[0].weight.data[3, 2] = 7.0
        state = trainer.state_dict_for_model()
        exact["0.weight"][3, 2] = 7.0
        assert_equal(state["0.weight"], exact["0.weight"], "all but one element")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_update_of_ones_own_is_saved_and_gone_on_from(precision: str, tmp_path: Path) -> None:
    """state_dict_for_model() and save() gave the weights of before it."""
    model = mlp()
    with make(model, precision=precision) as trainer:
        for _ in range(5):
            trainer.forward_backward(*batch())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad.to(parameter.dtype), alpha=0.5)
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, model.state_dict()[name].float(), name)
        trainer.save(tmp_path / "checkpoint")
        loss = trainer.step(*batch()).loss
    with make(mlp(), precision=precision) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert trainer.step(*batch()).loss == loss


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_embedding_with_max_norm_is_the_plain_one(precision: str) -> None:
    """It shrinks rows within the forward; in 16 bits the master brought the long ones back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    ids, y = torch.arange(8), torch.arange(8) % 4
    with make(model, precision=precision, optimizer=torch.optim.SGD, lr=0.1, microbatches=1) as trainer:
        for _ in range(3):
            trainer.step(ids, y)
            plain.zero_grad()
            F.cross_entropy(plain(ids), y).backward()
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
    tolerance = 2e-2 if precision == "bf16" else 1e-6
    torch.testing.assert_close(model[0].weight.float(), plain[0].weight, atol=tolerance, rtol=tolerance)


def test_averaged_copies_train_on_nothing() -> None:
    """deepcopy and AveragedModel between steps, in the middle of training."""
    model = mlp()
    with make(model, precision="fp16") as trainer:
        trainer.step(*batch())
        average = torch.optim.swa_utils.AveragedModel(model)
        loss = trainer.step(*batch()).loss
        average.update_parameters(model)
        assert trainer.step(*batch()).loss < loss
        twin = copy.deepcopy(model)
        assert all(parameter.grad is None for parameter in twin.parameters())
        twin.float()(batch()[0]).sum().backward()
        assert not trainer.step(*batch()).skipped


# One model, several trainers


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("then", ["bf16", "fp16", "fp32"])
def test_a_second_trainer_begins_with_the_weights_of_now_in_full(then: str, closed: bool) -> None:
    """It took the first one's masters as they were, or in another precision the rounded weights."""
    model = mlp()
    first = make(model)
    first.step(*batch())
    model[2].weight.data.fill_(0.5)
    if closed:
        first.close()
    exact = first.state_dict_for_model()
    with make(model, precision=then) as second:
        second.prepare(*batch())
        for name, value in second.state_dict_for_model().items():
            assert_equal(value, exact[name], name)
        second.step(*batch())
        for call in (first.state_dict_for_model, lambda: first.save("nowhere")):
            with pytest.raises(RuntimeError, match="another trainer has taken over"):
                call()
    first.close()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_closed_trainer_gives_the_classes_back_and_still_has_the_values(precision: str) -> None:
    """After close() linear layers stayed fused."""
    model = mlp()
    with make(model, precision=precision, schedule="zb") as trainer:
        trainer.step(*batch())
        assert type(model[0]) is not nn.Linear
        exact = trainer.state_dict_for_model()
    assert type(model[0]) is type(model[2]) is nn.Linear
    for name, value in trainer.state_dict_for_model().items():
        assert_equal(value, exact[name], name)
    with pytest.raises(RuntimeError, match="was closed"):
        trainer.step(*batch())


def test_layers_that_the_user_fused_stay_fused() -> None:
    import spu

    model = spu.accelerate(mlp())
    with make(model) as trainer:
        trainer.step(*batch())
    assert type(model[0]) is spu.nn.Linear


# Other parameters than those of then


def test_a_parameter_that_is_unfrozen_later_is_refused_and_a_new_trainer_goes_on(tmp_path: Path) -> None:
    """It was never updated, and its gradient grew from step to step, in fp16 multiplied by the loss scale."""
    model = mlp()
    model[0].requires_grad_(False)
    trainer = make(model, precision="fp16")
    trainer.step(*batch())
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' was frozen .* make a new one"):
        trainer.step(*batch())
    with pytest.raises(RuntimeError, match="'0.weight' was frozen"):
        trainer.forward_backward(*batch())
    assert trainer.evaluate(*batch()) > 0
    trainer.save(tmp_path / "checkpoint")
    trainer.close()
    before = model[0].weight.clone()
    with make(model, precision="fp16", lr=0.1) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert trainer.steps_done == 1
        trainer.step(*batch())
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD], ids=["ours", "torch"])
def test_a_parameter_that_is_frozen_later_rests(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with make(model, optimizer=optimizer, lr=0.1) as trainer:
        trainer.step(*batch())
        model[0].weight.requires_grad_(False)
        before, bias = model[0].weight.clone(), model[0].bias.clone()
        trainer.step(*batch())
        assert_equal(model[0].weight, before)
        assert not torch.equal(model[0].bias, bias)
        model[0].weight.requires_grad_(True)
        trainer.step(*batch())
        assert not torch.equal(model[0].weight, before)


# What is not whole, and what cannot train


class FailsInStage1(torch.optim.SGD):
    made: list[FailsInStage1] = []  # noqa: RUF012

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.made.append(self)

    def step(self, closure: Any = None) -> Any:
        if self.made[1] is self:
            raise ArithmeticError("no update today")
        return super().step(closure)


def test_a_half_failed_update_is_not_saved(tmp_path: Path) -> None:
    """save() replaced the last good checkpoint by weights of two different steps, without a word."""
    FailsInStage1.made = []
    with make(mlp(), optimizer=FailsInStage1, lr=None, precision="fp32") as trainer:
        trainer.prepare(*batch())
        trainer.save(tmp_path / "checkpoint")
        good = trainer.state_dict_for_model()
        with pytest.raises(StageError, match="no update today"):
            trainer.step(*batch())
        for call in (lambda: trainer.save(tmp_path / "checkpoint"), trainer.state_dict_for_model):
            with pytest.raises(RuntimeError, match="an update failed half-way"):
                call()
        trainer.load(tmp_path / "checkpoint")
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, good[name], name)


def test_a_loss_without_a_graph_and_a_frozen_model_are_errors() -> None:
    """They trained nothing, with grad_norm 0 and no word; torch raises."""
    x, y = batch()
    for stages in (1, 2):
        with (
            make(mlp(), stages, loss_fn=lambda o, t: F.cross_entropy(o.detach(), t)) as trainer,
            pytest.raises(RuntimeError, match="nothing to train"),
        ):
            trainer.step(x, y)
        with make(mlp().requires_grad_(False), stages) as trainer:
            assert trainer.evaluate(x, y) > 0
            with pytest.raises(RuntimeError, match="nothing to train"):
                trainer.step(x, y)
    wanted = x.clone().requires_grad_()
    with make(mlp().requires_grad_(False), precision="fp32") as trainer:
        trainer.forward_backward(wanted, y)  # gradients of the inputs alone
    assert wanted.grad is not None


# What the caller has switched on


@pytest.mark.parametrize(("precision", "around"), [("fp16", torch.bfloat16), ("bf16", torch.float16)])
def test_a_16_bit_training_under_autocast_of_the_other_kind(precision: str, around: torch.dtype) -> None:
    """Torch refuses to join outputs in fp16 under autocast for bf16."""
    x, y = batch()
    with make(mlp(), precision=precision, lr=0.0, loss_fn=lambda out, target: F.cross_entropy(out, target)) as trainer:
        plain = trainer.step(x, y)
        with torch.autocast("cpu", around):
            result = trainer.step(x, y)
            assert trainer.evaluate(x, y) == pytest.approx(plain.loss, rel=1e-2)
            outputs = trainer.forward_backward(x, y)[1]
    assert result.loss == pytest.approx(plain.loss, rel=1e-2)
    assert outputs.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def test_autocast_and_a_backend_around_a_call_reach_the_workers() -> None:
    """Both are settings of the calling thread, and were ignored."""
    model = mlp()
    x, y = batch()
    with make(model, precision="fp32", lr=0.0) as trainer:
        plain = trainer.step(x, y).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [F.cross_entropy(model(a).float(), b) for a, b in zip(x.chunk(2), y.chunk(2))]
            assert trainer.step(x, y).loss == pytest.approx((sum(losses) / 2).item(), rel=1e-6)
            assert trainer.evaluate(x, y) != plain
        assert trainer.step(x, y).loss == plain
        seen = []
        model[1].register_forward_hook(lambda *_: seen.append(ops.forced_backend()))
        with ops.use_backend("reference"):
            trainer.step(x, y)
        assert set(seen) == {"reference"}
        trainer.step(x, y)
        assert seen[-1] != "reference"
