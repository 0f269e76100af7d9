"""Optimizers that the user gives: trained and resumed over stages as plain PyTorch's, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, layers, trainer
from torch import Tensor, nn

from spu.checkpoint.writing import CheckpointError
from spu.engine.counted import state_bytes
from spu.engine.make_optimizer import check_class


class ByRate(torch.optim.Optimizer):
    """Names its rate otherwise than torch's."""

    def __init__(self, params: Any, rate: float = 0.1) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["times"] = self.state[p].get("times", 0) + 1
                    p.add_(p.grad, alpha=-group["rate"] / self.state[p]["times"])


class Counts(torch.optim.SGD):
    """Saves a number of its own."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}


class Again(torch.optim.SGD):
    def step(self, evaluate: Callable[[], Any], times: int = 2) -> None:  # type: ignore[override]
        for _ in range(times):
            evaluate()
            super().step()


def _two_groups(parameters: Any) -> torch.optim.Optimizer:
    given = list(parameters)
    matrices = [p for p in given if p.dim() > 1]
    rest = [p for p in given if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=False)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "nesterov": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1, lr_decay=0.1),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.05),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.02),
    "muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.05),
    "groups": _two_groups,
    "no lr": functools.partial(ByRate, rate=0.2),
}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_over_other_stages_with_the_bits_of_plain_torch(name: str, tmp_path: Path) -> None:
    """One whose groups have no 'lr' ended in KeyError: 'lr'."""
    batches, parts = [batch(seed=seed) for seed in range(4)], 2
    plain = nn.Sequential(*layers())
    optimizer = OPTIMIZERS[name](plain.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts)):
            (F.cross_entropy(plain(part_x), part_y) / parts).backward()
        optimizer.step()
    made = [nn.Sequential(*layers()) for _ in range(2)]
    with trainer(made[0], 1, optimizer=OPTIMIZERS[name], microbatches=parts) as first:
        for x, y in batches[:2]:
            first.step(x, y)
        first.save(tmp_path / "checkpoint")
    with trainer(made[1], 2, optimizer=OPTIMIZERS[name], microbatches=parts) as second:
        second.prepare(*batches[0])
        second.load(tmp_path / "checkpoint")
        for x, y in batches[2:]:
            second.step(x, y)
        state = second.state_dict_for_model()
    for key, value in plain.state_dict().items():
        assert_equal(state[key], value, key)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.LBFGS, "LBFGS.step() needs closure: a trainer runs the batch once"),
        (functools.partial(torch.optim.LBFGS, lr=1.0), "LBFGS.step() needs closure"),
        (Again, "Again.step() needs evaluate"),
        (torch.optim.SparseAdam, "SparseAdam steps sparse gradients alone"),
    ],
    ids=["class", "partial", "own", "sparse"],
)
def test_an_optimizer_that_no_trainer_can_step_is_refused_by_name(optimizer: Any, said: str) -> None:
    """It failed in the midst of the first update: load a checkpoint, it said then."""
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        trainer(nn.Sequential(*layers()), optimizer=optimizer)
    model = nn.Sequential(*layers())
    with trainer(model, optimizer=lambda p: optimizer(p), precision="bf16") as made, pytest.raises(ValueError):
        made.step(*batch())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_optimizers_of_torch_are_taken() -> None:
    for kind in (torch.optim.SGD, torch.optim.Muon, torch.optim.ASGD, ByRate, Counts):
        check_class(kind)


def test_a_state_that_no_checkpoint_would_hold_is_refused(tmp_path: Path) -> None:
    """A resumed run began it anew, where a plain load_state_dict goes on."""
    with trainer(nn.Sequential(*layers()), optimizer=lambda p: Counts(p, lr=0.1)) as made:
        made.step(*batch())
        with pytest.raises(CheckpointError, match=r"Counts.state_dict\(\) has count beside"):
            made.save(tmp_path / "checkpoint")
        made.replan()  # the stages stay: new optimizers would not have it
        made.step(*batch())


def test_a_schedule_without_a_rate_to_multiply_is_refused() -> None:
    factors = [0.5, 1.0]
    model = nn.Sequential(*layers())
    with trainer(model, optimizer=ByRate, lr_schedule=lambda step: factors[0]) as made:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="have no 'lr' to multiply"):
            made.step(*batch())
        assert all(map(torch.equal, before, model.parameters()))
        del factors[0]
        made.step(*batch())


def test_a_stage_without_a_parameter_for_the_optimizer_is_named() -> None:
    """torch's words alone were: optimizer got an empty parameter list."""

    def muon(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in parameters if p.dim() == 2])

    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    with trainer(model, optimizer=muon) as made, pytest.raises(ValueError, match=r"one of them .* of shape \(4,\)"):
        made.step(*batch())


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4 + 4), ("bf16", 2 + 4 + 4)])
def test_the_state_of_any_optimizer_is_counted(precision: str, bytes_each: int) -> None:
    """With report=, the first step ended in AttributeError: 'MasterOptimizer' object has no attribute 'state'."""
    told: list[str] = []
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    with trainer(nn.Sequential(*layers()), 1, optimizer=sgd, precision=precision, report=told.append) as made:
        for seed in range(2):
            made.step(*batch(seed=seed))
        runner = made._prepared()
        counted = state_bytes(runner.built, runner.updater.optimizers, runner.engine.ranks)
        elements = sum(p.numel() for p in made.parameters())
    assert len(told) == 1
    assert counted == [bytes_each * elements]  # weights, masters, momentum
