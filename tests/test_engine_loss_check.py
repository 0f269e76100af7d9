"""What the check of a user's loss finds, in every precision, and what it takes for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import trainer
from torch import Tensor, nn

from spu.engine.loss import weighing_of
from spu.engine.loss_check import LossCheck


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_wrong_share_of_a_small_term_is_found_in_every_precision(dtype: torch.dtype) -> None:
    """The rounding of 16-bit outputs hid it: their gradients were compared to 2% and 10%."""

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + 0.0005 * o.square().sum()  # the second term adds up over rows

    check = LossCheck(loss, weighing_of(loss))
    assert check.begin(4)
    for outputs, labels in zip(
        torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(dtype).split(4),
        (torch.arange(16) % 4).split(4),
    ):
        check.add(outputs, labels)
    with pytest.raises(ValueError, match="or its rows act on other microbatches"):
        check.end()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_that_rounds_to_16_bits_itself_is_trained(dtype: torch.dtype) -> None:
    """Of three microbatches: a third of a rounded gradient is not the rounded gradient of a third of the loss."""

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.to(dtype), t)

    check = LossCheck(loss, weighing_of(loss))
    assert check.begin(3)
    for outputs, labels in zip(
        torch.randn(18, 4, generator=torch.Generator().manual_seed(0)).split(6), (torch.arange(18) % 4).split(6)
    ):
        check.add(outputs, labels)
    check.end()


class Centers(nn.Module):
    """Distances to a center of each class, and a penalty on the centers."""

    def __init__(self, reduction: str, penalty: float = 0.5) -> None:
        super().__init__()
        self.reduction, self.penalty = reduction, penalty
        self.centers = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        own = torch.zeros((), requires_grad=True)  # a leaf of each call
        distance = F.mse_loss(outputs, self.centers[targets], reduction=self.reduction)
        return distance + self.penalty * self.centers.square().sum() + own


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("reduction", "penalty"), [("sum", 0.5), ("sum", 0.0), ("mean", 0.5)])
def test_a_penalty_on_a_losss_parameters_beside_a_sum_is_refused(
    reduction: str, penalty: float, ranks: int, precision: str
) -> None:
    """It counted once for each microbatch; beside a mean, whose shares are one together, it counts once."""
    seen = list[Any]()
    loss = Centers(reduction, penalty)
    loss.centers.register_hook(seen.append)
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with trainer(model, ranks, loss_fn=loss, precision=precision, microbatches=4) as ours:
        if reduction == "sum" and penalty:
            with pytest.raises(ValueError, match=r"its parameter of shape \(4, 4\) gets another gradient from 4 micro"):
                ours.step(x, y)
        else:
            assert not ours.step(x, y).skipped
    assert len(seen) == 4, "the check calls no hook"
