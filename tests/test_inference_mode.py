"""Calls under torch.inference_mode or no_grad, batches made there, and inputs that a first layer changes in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, every_schedule, mlp, plain_pass, trainer, with_and_without_recompute
from torch import nn
from torch.nn import functional as F

import spu

pytestmark = pytest.mark.usefixtures("reference")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_trainer_may_be_used_under_it(mode: Any, precision: str, tmp_path: Any) -> None:
    """A first evaluate() made tensors of it that no later step could update."""
    x, y = batch()
    with trainer(mlp(), precision=precision) as t:
        expected = [t.evaluate(x, y), t.step(x, y).loss, t.step(x, y).loss, t.evaluate(x, y)]
    with trainer(mlp(), precision=precision) as t:
        with mode():
            found = [t.evaluate(x, y), t.step(x, y).loss]
            t.save(tmp_path / "c")
            t.load(tmp_path / "c")
        found += [t.step(x, y).loss, t.evaluate(x, y)]
    assert found == expected
    with trainer(mlp(), precision=precision) as t:
        with mode():
            made, targets = x * 1, y + 0
            t.prepare(made, targets)
        assert [t.evaluate(made, targets), t.step(made, targets).loss, t.step(made, targets).loss] == expected[:3]
        t.forward_backward(made, targets)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("residency", ["offloaded", "streamed"])
def test_a_state_may_be_taken_out_of_a_tier_under_it(residency: str, precision: str, tmp_path: Any) -> None:
    """Saving and closing run deferred updates: tensors made there could not be trained, or not even be shown."""
    x, y = batch()
    settings = {"precision": precision, "residency": residency, "tiers": f"disk={tmp_path}:100MB"}
    with trainer(mlp(), 1, **settings) as t:
        expected = [t.step(x, y).loss for _ in range(4)]
    model = mlp()
    t = trainer(model, 1, **settings)
    found = [t.step(x, y).loss]
    with torch.inference_mode():
        state = t.state_dict_for_model()
        t.save(tmp_path / "c")
    found += [t.step(x, y).loss, t.step(x, y).loss]
    with torch.inference_mode():
        t.load(tmp_path / "c")
    assert all(map(torch.equal, state.values(), t.state_dict_for_model().values()))
    assert [t.step(x, y).loss for _ in range(2)] == expected[1:3]
    found.append(t.step(x, y).loss)
    with torch.inference_mode():
        t.close()
    assert found == expected
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_trainer_or_a_scaler_may_be_made_under_it() -> None:
    """The loss scale is changed in place in every step."""
    model, (x, y) = mlp(), batch()
    with torch.inference_mode():
        scaler, made = spu.LossScaler(growth_interval=1), trainer(model, precision="fp16")
        late = spu.LossScaler(growth_interval=1)
        late.scale(x.mean())
    with trainer(mlp(), precision="fp16") as t, made:
        assert [made.step(x, y).loss for _ in range(2)] == [t.step(x, y).loss for _ in range(2)]
    for each in (scaler, late):
        leaf = torch.ones(3, requires_grad=True)
        each.begin_step()
        each.scale(leaf.sum()).backward()
        each.update()
        assert leaf.grad is not None
        assert each.get_scale() == 2 * leaf.grad[0].item() == 2.0**17


@with_and_without_recompute
@every_schedule
def test_a_first_layer_may_change_its_input_in_place(schedule: str, ranks: int, virtual: int, recompute: bool) -> None:
    """Microbatches shared one version counter: a change of the second made the first one's backward fail."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    plain, (x, y) = copy.deepcopy(model), batch()
    changed = F.leaky_relu(x, 0.3)
    with trainer(model, ranks, schedule=schedule, virtual=virtual, recompute=recompute) as t:
        mine = x.clone()
        loss, _ = t.forward_backward(mine, y)
    assert_equal(loss, plain_pass(plain, x, y, 4, F.cross_entropy))
    assert_equal(mine, changed)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_input_that_wants_a_gradient_gets_one(ranks: int) -> None:
    x, y = batch()
    model = mlp()
    plain = copy.deepcopy(model)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with trainer(model, ranks) as t:
        t.forward_backward(ours, y)
    for part, target in zip(theirs.tensor_split(4), y.tensor_split(4), strict=True):
        (F.cross_entropy(plain(part), target) * 0.25).backward()
    assert_equal(ours.grad, theirs.grad)
    torch.manual_seed(0)
    in_place = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Linear(6, 6), nn.Linear(6, 4))
    with trainer(in_place, ranks) as t, pytest.raises(RuntimeError, match="modified inplace|in-place"):
        t.step(x.clone().requires_grad_(), y)
