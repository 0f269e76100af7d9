"""Validations: where they are, and that a mean is over targets, whatever the batches."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spu import ModelParallelTrainer
from spu.train.config import TrainConfig
from spu.train.evaluate import count, curve_windows, is_eval_step, mean_over_targets, perplexity, watched


@pytest.mark.parametrize(("steps", "evals", "points"), [(768, 10, 10), (5, 10, 5), (7, 3, 3), (1, 1, 1)])
def test_validation_points_are_as_many_as_asked_and_end_with_the_last_step(steps, evals, points):
    found = [done for done in range(1, steps + 1) if is_eval_step(TrainConfig(evals=evals), done, steps)]
    assert len(found) == points
    assert found[-1] == steps


def test_a_long_validation_says_how_long_the_rest_takes(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", iter([0.0, 0.0, 20.0, 40.0, 60.0]).__next__)
    pauses = []
    assert list(watched("abcd", lambda: pauses.append(1))) == list("abcd")
    assert len(pauses) == 4
    assert capsys.readouterr().out == "validating: 2 of 4 batches, 0:40 left\n"


def test_or_every_so_many_steps():
    config = TrainConfig(eval_every=4, eval_batches=3, batch=8)
    assert [done for done in range(1, 11) if is_eval_step(config, done, 10)] == [4, 8, 10]
    assert curve_windows(config) == 24


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mean_is_over_all_targets_wherever_they_are(accumulate):
    """A short and a masked batch weigh as many targets as they have; a microbatch may have none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    inputs, targets = torch.randint(11, (10, 6)), torch.randint(11, (10, 6))
    targets[0], targets[3, 1:], targets[7] = -100, -100, -100
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    gradients = [g.clone() for g in torch.autograd.grad(plain, list(model.parameters()))]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    plain = plain.item()
    batches = [(inputs[:4], targets[:4]), (inputs[4:7], targets[4:7]), (inputs[7:8], targets[7:8])]
    batches += [(inputs[8:], targets[8:])]
    settings = {"precision": "fp32", "microbatches": 2, "accumulate": accumulate, "lr": 1.0}
    with ModelParallelTrainer(model, ["cpu:0"], optimizer=torch.optim.SGD, **settings) as trainer:
        assert mean_over_targets(trainer.evaluate, batches) == pytest.approx(plain, rel=1e-6)
        result = trainer.step(inputs, targets)
    assert result.loss == pytest.approx(plain, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert [count(y) for _, y in batches] == [13, 18, 0, 12]
    with pytest.raises(ValueError, match="all are masked"):
        mean_over_targets(lambda x, y: 0.0, batches[2:3])


def test_perplexity_is_exp_of_the_loss_and_never_raises():
    assert perplexity(math.log(256)) == pytest.approx(256)
    assert perplexity(1e9) == math.inf
    assert math.isnan(perplexity(math.nan))
