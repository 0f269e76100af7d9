"""What several stages share has one life: the user's. And a loss that is a module trains with the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, mlp
from test_trainer_edits import make
from torch import nn

from spu import StageError

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(16, 16), nn.Dropout(0.5)
        self.register_buffer("shift", torch.zeros(16))
        self.gain = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x)) * self.gain + self.shift


def twice(block: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), block, nn.Tanh(), block, nn.Linear(16, 4))


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def plain_steps(
    model: nn.Module, count: int, lr: float, loss_fn: Callable[..., torch.Tensor] = F.cross_entropy
) -> None:
    more = list(loss_fn.parameters()) if isinstance(loss_fn, nn.Module) else []
    optimizer = torch.optim.SGD({id(p): p for p in [*model.parameters(), *more]}.values(), lr)
    for _ in range(count):
        optimizer.zero_grad()
        sum(loss_fn(model(x), y) / 2 for x, y in zip(*(part.chunk(2) for part in batch()))).backward()
        optimizer.step()


# Modules and parameters of several stages


def set_gain(model: nn.Sequential) -> None:
    model[1].gain = 2.0


def fill_buffer(model: nn.Sequential) -> None:
    model[1].shift.fill_(0.5)


def replace_buffer(model: nn.Sequential) -> None:
    model[1].shift = torch.full((16,), -0.5)


def fill_weight(model: nn.Sequential) -> None:
    model[1].linear.weight.data = torch.full((16, 16), 0.1)


@pytest.mark.parametrize("edit", [set_gain, fill_buffer, replace_buffer, fill_weight, lambda model: model.eval()])
def test_what_is_set_on_a_shared_block_reaches_every_use(edit: Callable[[nn.Sequential], Any]) -> None:
    """The second stage had a copy made at prepare(): modes and attributes set later reached one use of two."""
    model = twice(Block())
    with make(model, 3, precision="fp32") as trainer:
        trainer.step(*batch())
        model.eval()
        edit(model)
        plain = copy.deepcopy(model)
        assert trainer.step(*batch()).loss == pytest.approx(F.cross_entropy(plain(batch()[0]), batch()[1]).item(), 1e-6)
        loss = trainer.evaluate(*batch())
        assert loss == pytest.approx(F.cross_entropy(model(batch()[0]), batch()[1]).item(), 1e-6)
        model.train()
        assert trainer.step(*batch()).loss != trainer.step(*batch()).loss  # its dropout is on in both
    assert [layer.module for layer in trainer._parts.layers] == [model[i] for i in range(5)]


def test_shared_statistics_are_refused_by_name() -> None:
    """Two threads wrote them: five runs, five values."""
    model = twice(nn.BatchNorm1d(16))
    with make(model, 3) as trainer:
        with pytest.raises(ValueError, match="layer '3' is used in several stages, .* 'running_mean'"):
            trainer.prepare(*batch())
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        model.eval()
        trainer.step(*batch())
        model.train()
        with pytest.raises(RuntimeError, match="layer '3' is used in several stages"):
            trainer.step(*batch())
        assert all(parameter.grad is None for parameter in model.parameters())
    with make(twice(nn.BatchNorm1d(16)), 1) as trainer:
        trainer.step(*batch())  # one stage has them all


def test_a_shared_layer_that_counts_is_refused_by_name() -> None:
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    with (
        make(twice(Counts(16, 16)), 3) as trainer,
        pytest.raises(RuntimeError, match="layer '3' is used in several stages, and its forward changes 'calls'"),
    ):
        trainer.step(*batch())


@pytest.mark.parametrize(
    "held",
    [{"calls": 0}, [0], SimpleNamespace(calls=0), {"calls": torch.zeros(())}],
    ids=["dict", "list", "object", "tensor"],
)
def test_a_shared_layer_that_counts_in_what_it_holds_is_refused_by_name(held: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.held = nn.Linear(16, 16), held

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(held, list):
                held[0] += 1
                return self.linear(x) * held[0]
            table = held if isinstance(held, dict) else vars(held)
            table["calls"] += 1
            return self.linear(x) * float(table["calls"])

    shared = Counts()
    model = nn.Sequential(nn.Linear(6, 16), shared, nn.Linear(16, 16), shared, nn.Linear(16, 4))
    with (
        make(model, 3) as made,
        pytest.raises(RuntimeError, match="layer '3' is used in several stages, and its forward changes 'held'"),
    ):
        made.step(*batch())


def test_a_tied_weight_that_gets_new_data_has_it_in_every_use() -> None:
    """Later stages kept the old storage."""
    model = tied()
    with make(model, precision="fp32") as trainer:
        trainer.step(*batch())
        for index in (0, 2):
            model[index].weight.data = torch.full((6, 6), 0.1 * (1 + index))
            expected = F.cross_entropy(model(batch()[0]), batch()[1]).item()
            assert trainer.evaluate(*batch()) == pytest.approx(expected, rel=1e-6)
            assert trainer.step(*batch()).loss == pytest.approx(expected, rel=1e-6)


def test_between_steps_a_tied_weight_is_one_parameter() -> None:
    """The model had one for each stage: an update of one's own, a clip or an average counted it twice."""
    model, plain = tied(), tied()
    with make(model, precision="fp32", optimizer=torch.optim.SGD, lr=0.1) as trainer:
        trainer.step(*batch())
        assert model[2].weight is model[0].weight
        assert len(list(model.parameters())) == len(list(trainer.parameters())) == 3
        plain_steps(plain, 1, 0.1)
        for each in (model, plain):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(0.5)
        trainer.step(*batch())
        plain_steps(plain, 1, 0.1)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_weight_that_another_stage_uses_unseen_is_refused() -> None:
    """Held in a list, or by a loss's closure: both stages added to one gradient at the same time."""

    class Borrows(nn.Module):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__()
            self.other = [other]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.other[0].weight)

    first = nn.Linear(6, 6)
    with (
        make(nn.Sequential(first, nn.Tanh(), Borrows(first))) as trainer,
        pytest.raises(StageError, match="parameter '0.weight' of another stage is used in stage 1"),
    ):
        trainer.step(*batch())
    model = mlp()
    with (
        make(model, loss_fn=lambda o, t: F.cross_entropy(o, t) + model[0].weight.pow(2).sum()) as trainer,
        pytest.raises(StageError, match="parameter '0.weight' of another stage"),
    ):
        trainer.step(*batch())


# A loss with parameters


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(4))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.float() * self.scales, targets)


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: loss.forward, functools.partial], ids=["module", "method", "partial"]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_loss_that_is_a_module_trains_and_is_saved(precision: str, wrap: Any, tmp_path: Path) -> None:
    """Its parameters were in no optimizer, and in fp16 their gradients stayed multiplied by the loss scale."""
    loss, model = Scaled(), mlp()
    plain_loss, plain = copy.deepcopy(loss), copy.deepcopy(model)
    settings = {"precision": precision, "optimizer": torch.optim.SGD, "lr": 0.5, "max_grad_norm": None}
    with make(model, loss_fn=wrap(loss), **settings) as trainer:
        trainer.prepare(*batch())
        loss.zero_grad()
        for _ in range(3):
            trainer.step(*batch())
        assert set(trainer.state_dict_for_model()) == set(model.state_dict())
        trainer.save(tmp_path / "checkpoint")
    plain_steps(plain, 3, 0.5, plain_loss)
    torch.testing.assert_close(loss.scales, plain_loss.scales, atol=1e-3, rtol=1e-3)
    assert loss.scales.dtype == torch.float32
    fresh = Scaled()
    with make(mlp(), 1, loss_fn=wrap(fresh), **settings) as trainer:
        trainer.prepare(*batch())
        fresh.zero_grad()
        trainer.load(tmp_path / "checkpoint")
        assert_equal(fresh.scales, loss.scales)


def test_a_loss_tied_to_the_first_layer_trains_as_the_plain_one() -> None:
    class Regular(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(outputs, targets) + 0.1 * self.weight.pow(2).sum()

    model, plain = mlp(), mlp()
    loss = Regular(model[0].weight)
    with make(model, loss_fn=loss, precision="fp32", optimizer=torch.optim.SGD, lr=0.1) as trainer:
        trainer.prepare(*batch())
        model.zero_grad()
        for _ in range(2):
            trainer.step(*batch())
        assert loss.weight is model[0].weight
    plain_steps(plain, 2, 0.1, Regular(plain[0].weight))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_parameter_that_a_scaled_loss_hides_is_refused() -> None:
    """Its gradient was 65536 times too large, and nobody updated it."""
    hidden = Scaled()
    with make(mlp(), loss_fn=lambda o, t: hidden(o, t), precision="fp16") as trainer:
        trainer.prepare(*batch())
        hidden.zero_grad()
        with pytest.raises(StageError, match=r"uses a parameter of shape \(4,\) that is in no layer"):
            trainer.step(*batch())


def test_a_loss_with_the_model_and_a_parameter_of_its_own_is_refused() -> None:
    class Both(Scaled):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    model = mlp()
    with (
        make(model, loss_fn=Both(model)) as trainer,
        pytest.raises(ValueError, match="loss_fn holds layers of the model, and 'scales'"),
    ):
        trainer.prepare(*batch())


def test_stages_planned_again_keep_shared_blocks_and_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for worth in (-1e9, 1e9):  # the stages stay, or are built again
        monkeypatch.setattr("spu.trainer.staged.WORTH", worth)
        torch.manual_seed(1)
        model, loss = twice(Block()).eval(), Scaled()
        with make(model, 3, loss_fn=loss, precision="fp16", lr=0.1) as trainer:
            trainer.step(*batch())
            trainer.replan()
            set_gain(model)
            found.append([trainer.step(*batch()).loss for _ in range(2)] + loss.scales.tolist())
    assert found[0] == found[1]
