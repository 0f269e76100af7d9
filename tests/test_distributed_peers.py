"""Pipelines side by side: their gradients are those of the whole batch, and the same in each to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import devices
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.ops import use_backend


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    x, y = torch.randn(14, 6, generator=draws), torch.randint(4, (14,), generator=draws)
    y[:5] = -100  # the pipelines count different numbers of targets
    return x, y


def train(precision: str, folder: str = "") -> dict[str, Any]:
    """Gradients and loss of a batch, then three steps; a checkpoint into ``folder``, and two more."""
    x, y = batch()
    with (
        use_backend("reference"),
        ModelParallelTrainer(
            model(), engine="distributed", replicas=2, microbatches=2, precision=precision, lr=1e-2
        ) as trainer,
    ):
        loss = trainer.forward_backward(x, y, keep_outputs=False)[0].item()
        gradients = [p.grad.tolist() if p.grad is not None else None for p in trainer.parameters()]
        trainer.scaler.update()
        steps = [(result.loss, result.grad_norm) for result in (trainer.step(x, y) for _ in range(3))]
        found = {"loss": loss, "gradients": gradients, "steps": steps, "evaluated": trainer.evaluate(x, y)}
        if folder:
            trainer.save(folder)
            found["after"] = [trainer.step(x, y).loss for _ in range(2)]
        return found


def truth(dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
    net, (x, y) = copy.deepcopy(model()).to(dtype), batch()
    loss = F.cross_entropy(net(x.to(dtype)), y)
    loss.backward()
    return loss.item(), [p.grad for p in net.parameters() if p.grad is not None]


def test_two_pipelines_of_two_stages_have_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    first, second, third, fourth = in_ranks(4, train, "fp32", str(tmp_path / "saved"))
    assert first == third  # the same place in the two pipelines
    assert second == fourth
    for name in ("loss", "steps", "evaluated"):
        assert first[name] == second[name]
    assert first["steps"][0][0] > first["steps"][2][0] > first["evaluated"]
    loss, wanted = truth(torch.float64)
    plain_loss, plain = truth(torch.float32)
    eps = torch.finfo(torch.float32).eps
    assert abs(first["loss"] - loss) <= 2 * abs(plain_loss - loss) + eps * loss
    found = [a if a is not None else b for a, b in zip(first["gradients"], second["gradients"], strict=True)]
    for own, true, theirs in zip(found, wanted, plain, strict=True):
        error = (torch.tensor(own, dtype=torch.float64) - true).abs().max()
        assert error <= 2 * (theirs - true).abs().max() + eps * true.abs().max()
    with (
        use_backend("reference"),
        ModelParallelTrainer(model(), devices(1), precision="fp32", microbatches=4, lr=1e-2) as one,
    ):
        one.prepare(*batch())
        one.load(tmp_path / "saved")
        assert one.steps_done == 3
        # One process goes on as the four do: its loss is a sum in another order, of which each addition rounds once.
        for theirs in first["after"]:
            assert abs(one.step(*batch()).loss - theirs) <= 4 * eps * theirs
    both = [a is None for a in first["gradients"]], [b is None for b in second["gradients"]]
    assert all(a != b for a, b in zip(*both, strict=True))  # each parameter is trained in one place


def test_fp16_with_main_gradients_is_reduced_in_fp32() -> None:
    first, second, third, fourth = in_ranks(4, train, "fp16")
    assert first == third
    assert second == fourth
    _, wanted = truth(torch.float64)
    net, (x, y) = model().half(), batch()
    F.cross_entropy(net(x.half()).float(), y).backward()
    plain = [p.grad for p in net.parameters() if p.grad is not None]
    found = [a if a is not None else b for a, b in zip(first["gradients"], second["gradients"], strict=True)]
    for own, true, theirs in zip(found, wanted, plain, strict=True):
        error = (torch.tensor(own, dtype=torch.float64) - true).abs().max()
        assert error <= 2 * (theirs.double() - true).abs().max() + torch.finfo(torch.float16).eps * true.abs().max()


ROWS = (4, 5, 3, 8, 1, 2, 1, 9)  # of batches: shares that grow and shrink apart, and a pipeline without a row


def of_rows(places: Any, **settings: Any) -> list[float]:
    draws = torch.Generator().manual_seed(7)
    found: list[float] = []
    with (
        use_backend("reference"),
        ModelParallelTrainer(model(), places, precision="fp32", lr=1e-2, max_grad_norm=1.0, **settings) as trainer,
    ):
        for index, rows in enumerate(ROWS):
            x, y = torch.randn(rows, 6, generator=draws), torch.randint(4, (rows,), generator=draws)
            if index % 3:
                result = trainer.step(x, y)
                found += [result.loss, float(result.grad_norm)]
            found.append(trainer.evaluate(x, y))
        assert trainer.timeline().idle_share < 1
    return found


def of_rows_in_two_pipelines() -> list[float]:
    return of_rows("auto", engine="distributed", replicas=2, microbatches=1)


def test_pipelines_with_unlike_numbers_of_rows_stay_together() -> None:
    """What crosses between stages is counted in all of them or in none, whichever rows are whose; one may have none."""
    wanted = of_rows(devices(1), microbatches=2)
    for theirs in (*in_ranks(2, of_rows_in_two_pipelines), *in_ranks(4, of_rows_in_two_pipelines)):
        assert theirs == pytest.approx(wanted, rel=4 * torch.finfo(torch.float32).eps)


def with_deferred_weight_gradients() -> list[float]:
    x, y = batch()
    settings: dict[str, Any] = {"schedule": "zb", "microbatches": 4, "precision": "fp32", "lr": 1e-2}
    with (
        use_backend("reference"),
        ModelParallelTrainer(model(), engine="distributed", replicas=2, **settings) as trainer,
    ):
        return [trainer.step(x, y).loss for _ in range(3)]


def test_weight_gradients_that_wait_are_added_to_gradients_of_the_step_before() -> None:
    """The second step failed, as the memory of the first one's sums was a view that autograd lets nobody change."""
    net, (x, y) = model(), batch()
    optimizer, wanted = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    for theirs in in_ranks(4, with_deferred_weight_gradients):
        assert theirs == pytest.approx(wanted, rel=8 * torch.finfo(torch.float32).eps)


class Sum(nn.Module):
    """A loss that adds up over rows, which the weights of microbatches do not fit."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")


def summed(rows: int) -> str:
    x, y = torch.randn(rows, 6), torch.arange(rows) % 4
    with ModelParallelTrainer(
        model(), engine="distributed", replicas=2, microbatches=1, precision="fp32", loss_fn=Sum()
    ) as trainer:
        try:
            trainer.step(x, y)
        except ValueError as error:
            return str(error)
    return "no error"


def test_a_loss_is_checked_where_each_pipeline_has_one_microbatch() -> None:
    assert all("loss_fn cannot be computed by microbatches as it is" in said for said in in_ranks(2, summed, 8))
