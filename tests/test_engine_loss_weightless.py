"""Microbatches, and rows, that weigh nothing in the batch's mean."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from pipelines import trainer
from torch import nn

from spu.engine.loss import weighing_of


class Gate(nn.Module):
    """The second scale serves rows of negative sum only: which microbatches use it depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [(x.sum(-1) >= 0).nonzero()[:, 0], (x.sum(-1) < 0).nonzero()[:, 0]]
        out = torch.zeros_like(x)
        for scale, rows in zip(self.scales, parts):
            if len(rows):
                out = out.index_add(0, rows, x[rows] * scale)
        return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parameters_that_only_masked_rows_use_are_decayed_as_in_the_whole_batch(ranks: int) -> None:
    """They had no gradient at all where the gate was on the last stage, and kept their weights."""
    x = torch.rand(8, 6) + 0.1
    x[4:6] *= -1
    y = torch.tensor([0, 1, 2, 3, -100, -100, 2, 1])
    plain = nn.Sequential(nn.Identity(), Gate(), nn.Linear(6, 4))
    ours = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    F.cross_entropy(plain(x), y).backward()
    optimizer.step()
    factory = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    with trainer(ours, ranks, optimizer=factory) as t:
        t.step(x, y)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(plain[1].scales[1], torch.ones(6))


def test_a_microbatch_whose_weight_is_0_and_whose_smoothed_loss_is_not_is_named() -> None:
    """Its part of the numerator was left out: a mean of 1.60 for 1.88."""
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 2.0]), label_smoothing=0.1)
    weighing = weighing_of(loss)
    with pytest.raises(ValueError, match="label_smoothing gives them a loss.*a small weight"):
        weighing.shares([torch.tensor([0, 2]), torch.tensor([1, 1])])
    assert [float(share) for share in weighing.shares([torch.tensor([0, 1]), torch.tensor([-100, -100])])] == [1.0, 0.0]
    plain = weighing_of(nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 2.0])))
    assert [float(share) for share in plain.shares([torch.tensor([0, 1]), torch.tensor([1, 1])])] == [1.0, 0.0]
