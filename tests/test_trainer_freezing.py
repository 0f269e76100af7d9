"""Parameters that are frozen after prepare() rest, as in plain PyTorch, and train on when they are thawed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, trainer
from torch import nn

from spu.precision import LossScaler, MainGrads


def net(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 4))
    if tied:
        model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("precision", "first"),
    [("fp32", "nothing"), ("fp16", "nothing"), ("bf16", "evaluate"), ("fp32", "forward_backward"), ("fp16", "step")],
)
@pytest.mark.parametrize(
    ("schedule", "tied", "recompute"), [("1f1b", False, False), ("zb", True, False), ("zbv", False, True)]
)
def test_frozen_and_thawed_in_any_order(
    schedule: str, tied: bool, recompute: bool, first: str, precision: str, tmp_path: Path
) -> None:
    """One that was frozen before the first step ended in "cannot register a hook on a tensor"."""
    model = net(tied)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    x, y = batch()
    settings: dict[str, Any] = {"schedule": schedule, "recompute": recompute, "precision": precision}
    settings["optimizer"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    tolerance = 1e-5 if precision == "fp32" else 3e-2

    def both(update: bool) -> None:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if not update:
            ours.forward_backward(x, y)
        else:
            ours.step(x, y)
            optimizer.step()
        for (name, own), theirs in zip(model.named_parameters(), plain.named_parameters()):
            for a, b in ((own, theirs[1]), (own.grad, theirs[1].grad)):
                assert (a is None) == (b is None), name
                if a is not None:
                    torch.testing.assert_close(a.detach().float(), b.detach(), atol=tolerance, rtol=tolerance)

    with trainer(model, 2, **settings) as ours:
        ours.prepare(x, y)
        if first in ("forward_backward", "step"):
            both(first == "step")
        elif first == "evaluate":
            ours.evaluate(x, y)
        for part, frozen in [((0, 4), True), ((4,), False), ((0,), False), ((2, 3), True), ((0, 2), True)]:
            for index in part:
                model[index].requires_grad_(not frozen)
                plain[index].requires_grad_(not frozen)
            both(False)
            both(True)
            ours.save(tmp_path / "checkpoint")
            ours.load(tmp_path / "checkpoint")
        model.requires_grad_(True)
        plain.requires_grad_(True)
        both(True)


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD], ids=["ours", "torch"])
def test_a_frozen_weight_keeps_its_low_bits(optimizer: Any, tmp_path: Path) -> None:
    """save() and state_dict_for_model() gave what it rounds to."""
    model = net()
    with trainer(model, 2, precision="bf16", optimizer=optimizer, lr=1e-3) as ours:
        ours.step(*batch())
        exact = ours.state_dict_for_model()
        assert not torch.equal(exact["0.weight"], model[0].weight.float())
        model[0].requires_grad_(False)
        assert_equal(ours.state_dict_for_model()["0.weight"], exact["0.weight"])
        ours.save(tmp_path / "checkpoint")
        ours.step(*batch())
        ours.load(tmp_path / "checkpoint")
        for name, value in ours.state_dict_for_model().items():
            assert_equal(value, exact[name], name)


def test_a_weight_that_is_thawed_too_late_is_still_saved(tmp_path: Path) -> None:
    """With a torch optimizer, which does not hold it, save() ended in StopIteration."""
    model = net()
    model[0].requires_grad_(False)
    with trainer(model, 2, precision="bf16", optimizer=torch.optim.SGD, lr=1e-3) as ours:
        ours.step(*batch())
        model[0].requires_grad_(True)
        assert_equal(ours.state_dict_for_model()["0.weight"], model[0].weight)
        ours.save(tmp_path / "checkpoint")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planning_again_keeps_what_rests(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizers of the new stages did not hold it: its moments were lost, and thawing it was refused."""
    monkeypatch.setattr("spu.trainer.staged.WORTH", math.inf)
    monkeypatch.setattr("spu.trainer.planner.WORTH", math.inf)
    results = []
    for again in (False, True):
        model = net()
        with trainer(model, 2, precision=precision, lr=0.01) as ours:
            for _ in range(2):
                ours.step(*batch())
            model[3].requires_grad_(False)
            ours.step(*batch())
            if again:
                before = ours._runner
                ours.replan()
                assert ours._runner is not before
            assert not model[3].weight.requires_grad
            ours.step(*batch())
            model[3].requires_grad_(True)
            ours.step(*batch())
            results.append(ours.state_dict_for_model())
    for name, value in results[0].items():
        assert_equal(results[1][name], value, name)


def test_main_grads_of_a_frozen_parameter_wait_for_it() -> None:
    norm = nn.LayerNorm(3)
    main_grads, scaler = MainGrads(norm.parameters()), LossScaler(4.0)
    norm.bias.requires_grad_(False)
    main_grads.begin_step()
    assert not norm.bias.requires_grad
    scaler.scale(norm(torch.ones(2, 3)).sum()).backward()
    assert norm.bias.grad is None
    norm.bias.requires_grad_(True)
    scaler.scale(norm(torch.ones(2, 3)).sum()).backward()
    assert_equal(norm.bias.grad, torch.full((3,), 2.0))
