"""A step that runs out of memory is repeated with less, and the training is as if it had been planned so."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, trainer
from starved import Starved, StarvedLoss, starve
from torch import nn

from spu import ModelParallelTrainer, StageError
from spu.engine.loss_check import LossCheck
from spu.plan import Plan

pytestmark = pytest.mark.usefixtures("reference")

ROWS = 16


def model(*, dropout: float = 0.0, **limits: int) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 16))
    return nn.Sequential(nn.Linear(6, 16), middle, Starved(**limits), nn.Linear(16, 4))


def starved_layer(own: nn.Module) -> Starved:
    return next(module for module in own.modules() if isinstance(module, Starved))


def trained(own: nn.Module, ranks: int = 2, steps: int = 3, **settings: Any) -> tuple[list[Any], ModelParallelTrainer]:
    """Train; return losses, norms, weights, loss scales, and the trainer, which is closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with trainer(own, ranks, **settings) as made:
            results = [made.step(*batch(ROWS, seed=index)) for index in range(steps)]
            seen = [(r.loss, r.grad_norm, r.loss_scale, r.skipped) for r in results]
            state = made.state_dict_for_model()
            return [seen, state, made.scaler.state_dict(), made.steps_done, made.passes_done], made


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert found[0] == expected[0]
    for name, weight in expected[1].items():
        assert_equal(found[1][name], weight, name)
    assert found[2:] == expected[2:]


@pytest.mark.parametrize(
    ("schedule", "ranks", "virtual", "precision", "where"),
    [
        ("gpipe", 1, 1, "fp32", "rows"),
        ("gpipe", 3, 1, "fp16", "backward_rows"),
        ("1f1b", 2, 1, "fp16", "rows"),
        ("interleaved", 2, 2, "fp32", "backward_rows"),
        ("zb", 2, 1, "fp16", "backward_rows"),
        ("layer_outer", 1, 4, "fp16", "rows"),
    ],
)
def test_smaller_microbatches_are_those_of_a_run_planned_with_them(
    schedule: str, ranks: int, virtual: int, precision: str, where: str
) -> None:
    settings = {"schedule": schedule, "virtual": virtual, "precision": precision, "max_grad_norm": 0.5}
    settings["recompute"] = True
    expected, _ = trained(model(dropout=0.2), ranks, microbatches=8, **settings)
    own = model(dropout=0.2, **{where: 2})
    found, made = trained(own, ranks, microbatches=4, **settings)
    assert made.plan.settings.microbatches == 8
    assert 4 in starved_layer(own).seen  # it was tried as planned first
    assert_same(found, expected)


@pytest.mark.parametrize(("schedule", "ranks", "precision"), [("gpipe", 1, "fp32"), ("gpipe", 2, "fp16")])
def test_recompute_comes_first_and_changes_no_bit(schedule: str, ranks: int, precision: str) -> None:
    settings = {"schedule": schedule, "precision": precision, "microbatches": 4}
    expected, _ = trained(model(dropout=0.2), ranks, **settings)
    own = model(dropout=0.2, graphs=1)
    found, made = trained(own, ranks, **settings)
    assert made.plan.settings.microbatches == 4
    assert made.plan.recomputed_layers == {0, 1, 2, 3}
    assert_same(found, expected)


def counted(targets: torch.Tensor) -> int:
    return len(targets)


def test_the_loss_may_run_out_of_memory_too() -> None:
    expected, _ = trained(model(), loss_fn=StarvedLoss(ROWS), microbatches=4, loss_weight=counted)
    found, made = trained(model(), loss_fn=StarvedLoss(4), microbatches=2, loss_weight=counted)
    assert made.plan.settings.microbatches == 4
    assert_same(found, expected)


def test_a_later_larger_batch_and_a_ragged_one() -> None:
    own = model(rows=2)
    with trainer(own, 1, microbatches=4, recompute=True) as made:
        made.step(*batch(8))
        with pytest.warns(RuntimeWarning, match="from now on microbatches=8"):
            made.step(*batch(13, seed=1))
        assert starved_layer(own).seen.count(4) == 1  # of 13 rows in 4 microbatches
        assert made.plan.rows == 2
        seen = len(starved_layer(own).seen)
        made.step(*batch(3, seed=2))
        assert starved_layer(own).seen[seen:] == [1] * 6  # three, and again in the backward


def test_the_user_is_told() -> None:
    said: list[str] = []
    with (
        trainer(model(rows=4), microbatches=2, recompute=True, report=said.append) as made,
        pytest.warns(RuntimeWarning, match=r"microbatches=4, and the step is repeated") as told,
    ):
        made.step(*batch(ROWS))
    assert told[0].filename == __file__
    assert "can't allocate memory: you tried to allocate" in said[0]
    assert "action 1F0" in said[0]
    assert "rounding of sums" in said[0]


def test_after_a_notch_that_runs_out_of_memory_itself_comes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = ModelParallelTrainer._go_on_by

    def fails(self: ModelParallelTrainer, plan: Plan) -> None:
        if plan.settings.microbatches == 2:  # recompute=True
            raise MemoryError  # Python's own says nothing more
        go_on(self, plan)

    monkeypatch.setattr(ModelParallelTrainer, "_go_on_by", fails)
    _, made = trained(model(rows=4), microbatches=2)
    assert made.plan.settings.microbatches == 4


def test_with_retry_off_it_fails_as_any_stage() -> None:
    own = model(rows=4)
    with trainer(own, microbatches=2, retry=False) as made:
        with pytest.raises(StageError, match="can't allocate memory") as error:
            made.step(*batch(ROWS))
        assert "what would help" not in str(error.value)
        assert isinstance(error.value.__cause__, RuntimeError)
        assert (made.steps_done, made.plan.settings.microbatches, starved_layer(own).seen) == (0, 2, [8])


def test_a_given_plan_is_kept() -> None:
    with trainer(model(), microbatches=2) as first:
        plan = first.prepare(*batch(ROWS))
    own = model(rows=4)
    with trainer(own, microbatches=2, plan=plan) as made:
        with pytest.raises(StageError, match=r"can't allocate memory[^\n]*\n  what would help:\n.*the plan was given"):
            made.step(*batch(ROWS))
        assert made.plan == plan
        assert starved_layer(own).seen == [8]


def test_one_row_that_does_not_fit_is_an_error_and_the_trainer_goes_on() -> None:
    own = model(rows=0)
    with trainer(own, microbatches=8, recompute=True) as made:
        with (
            pytest.warns(RuntimeWarning, match="microbatches=16"),
            pytest.raises(StageError, match="one row already") as error,
        ):
            made.step(*batch(ROWS))
        assert error.value.stage == 1
        assert (made.steps_done, made.passes_done) == (0, 0)
        assert all(parameter.grad is None for parameter in own.parameters())
        starved_layer(own).rows = ROWS
        found = made.step(*batch(ROWS)).loss
    with trainer(model(), microbatches=16) as other:
        assert found == other.step(*batch(ROWS)).loss


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"microbatches": 1, "recompute": True}, "microbatches=2: with microbatches=1 rows may act on each other"),
        ({"microbatches": 16, "recompute": False}, "recompute=True: the trainer was told to recompute off"),
    ],
)
def test_what_the_user_has_decided_is_kept_and_named(settings: dict[str, Any], said: str) -> None:
    with trainer(model(rows=0), 1, **settings) as made, pytest.raises(StageError, match=said):
        made.step(*batch(ROWS))


def test_an_automatic_number_of_one_microbatch_is_not_the_users() -> None:
    own = model()
    with trainer(own, 1, microbatches="auto", recompute=True) as made:
        made.prepare(*batch(ROWS))
        before = made.plan.settings.microbatches
        assert before < ROWS
        starved_layer(own).rows = ROWS // before - 1
        with pytest.warns(RuntimeWarning, match=f"microbatches={2 * before}"):
            made.step(*batch(ROWS))


class Counter(nn.Module):
    """A layer with a small buffer, one that is replaced, and a generator of its own, which all change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("mean", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean()
        return x * torch.rand(x.shape, generator=self.generator) * self.calls[0]


def test_buffers_and_generators_are_put_back() -> None:
    def make(graphs: int) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), Counter(), Starved(graphs=graphs), nn.Linear(16, 4))

    expected, _ = trained(make(99), 1, schedule="gpipe", recompute=True)
    found, made = trained(make(1), 1, schedule="gpipe")
    assert made.plan.recompute
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("layer", "said"),
    [(nn.BatchNorm1d(16), "a batch norm would see fewer rows"), (Counter(), "a layer changes a buffer")],
)
def test_layers_that_see_whole_microbatches_keep_them(layer: nn.Module, said: str) -> None:
    own = nn.Sequential(nn.Linear(6, 16), layer, Starved(rows=4), nn.Linear(16, 4))
    with (
        trainer(own, microbatches=2, recompute=True) as made,
        pytest.raises(StageError, match=f"microbatches=4: {said}"),
    ):
        made.step(*batch(ROWS))


class Drifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(0.99)
        return x * self.weight


def test_a_step_that_cannot_be_put_back_is_not_repeated() -> None:
    own = nn.Sequential(nn.Linear(6, 16), Drifts(), Starved(rows=4), nn.Linear(16, 4))
    with (
        trainer(own, 1, microbatches=2) as made,
        pytest.raises(StageError, match="not repeated with less: a parameter of stage 0 was changed in place"),
    ):
        made.step(*batch(ROWS))


def test_gradients_outside_the_model_are_not_added_twice() -> None:
    x, y = batch(ROWS)
    source = torch.ones(6, requires_grad=True)
    with (
        trainer(model(backward_rows=4), 1, microbatches=2) as made,
        pytest.raises(StageError, match="gradients go to tensors outside"),
    ):
        made.step(x * source, y)
    outside = nn.Parameter(torch.ones(16))
    own = nn.Sequential(nn.Linear(6, 16), Uses(outside), Starved(), nn.Linear(16, 4))
    with trainer(own, 1, microbatches=2) as made:
        made.step(x, y)
        starved_layer(own).rows = 4
        with pytest.raises(StageError, match="gradients go to tensors outside"):
            made.step(x, y)


class Uses(nn.Module):
    def __init__(self, outside: torch.Tensor) -> None:
        super().__init__()
        self.held = [outside]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.held[0]


class FailsToUpdate(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        starve()


def test_an_update_is_not_repeated() -> None:
    with trainer(model(), optimizer=FailsToUpdate, lr=0.1, microbatches=2) as made:
        with pytest.raises(StageError, match="can't allocate memory"):
            made.step(*batch(ROWS))
        assert made.plan.settings.microbatches == 2
        with pytest.raises(RuntimeError, match="an update failed half-way"):
            made.step(*batch(ROWS))


def test_nothing_of_a_failed_attempt_is_held() -> None:
    own = model(backward_rows=2)
    layer = starved_layer(own)
    before: list[int] = []

    def look(module: nn.Module, inputs: Any) -> None:
        before.append(sum(reference() is not None for reference in layer.alive))

    own[0].register_forward_pre_hook(look)
    with trainer(own, schedule="gpipe", microbatches=2, recompute=False) as made, warnings.catch_warnings():
        made.prepare(*batch(ROWS))
        warnings.simplefilter("ignore", RuntimeWarning)
        before.clear()
        made.step(*batch(ROWS))
    assert made.plan.settings.microbatches == 8
    assert len(before) == 2 + 4 + 8
    assert (before[0], before[2], before[6]) == (0, 0, 0)  # the first ones of all attempts


def test_a_failure_is_not_held_either() -> None:
    own = model(rows=0)
    layer = starved_layer(own)
    with trainer(own, microbatches=16, recompute=False) as made:
        layer.rows = ROWS
        made.step(*batch(ROWS))
        layer.graphs = 0
        with pytest.raises(StageError):
            made.step(*batch(ROWS))
        gc.collect()
        assert all(reference() is None for reference in layer.alive)


def test_gradients_of_a_pass_by_hand_are_those_of_one_pass() -> None:
    found, expected = model(backward_rows=2, dropout=0.1), model(dropout=0.1)
    with trainer(found, microbatches=2) as made, pytest.warns(RuntimeWarning, match="microbatches=8"):
        loss, outputs = made.forward_backward(*batch(ROWS))
    with trainer(expected, microbatches=8) as other:
        wanted, wanted_outputs = other.forward_backward(*batch(ROWS))
    assert_equal(loss, wanted, "loss")
    assert_equal(outputs, wanted_outputs, "outputs")
    for name, parameter in expected.named_parameters():
        assert_equal(found.get_parameter(name).grad, parameter.grad, name)


def test_schedules_of_the_rate_are_asked_once_a_step() -> None:
    asked: list[int] = []

    def factor(step: int) -> float:
        asked.append(step)
        return 1.0

    trained(model(rows=2), microbatches=2, lr_schedule=factor)
    assert asked == [0, 1, 2]


def test_the_check_of_the_loss_counts_a_repeated_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[bool] = []
    begin = LossCheck.begin
    monkeypatch.setattr(LossCheck, "begin", lambda self, parts: checks.append(begin(self, parts)) or checks[-1])

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]).mean()

    trained(model(), 1, 4, loss_fn=loss, microbatches=4, recompute=True)
    assert checks == [True, True, False, True]  # the steps 1, 2, 4
    checks.clear()
    trained(model(rows=4), 1, 4, loss_fn=loss, microbatches=2, recompute=True)
    assert checks == [True, True, True, False, True]


def test_a_checkpoint_after_it_is_any_checkpoint(tmp_path: Path) -> None:
    with trainer(model(rows=2, dropout=0.1), microbatches=2) as made, pytest.warns(RuntimeWarning):
        made.step(*batch(ROWS))
        made.save(tmp_path / "at")
        expected = made.step(*batch(ROWS, seed=1)).loss
    with trainer(model(dropout=0.1), microbatches=8) as other:
        other.prepare(*batch(ROWS))
        other.load(tmp_path / "at")
        assert other.step(*batch(ROWS, seed=1)).loss == expected


def test_replanning_keeps_what_was_lowered() -> None:
    own = model(rows=2)
    with trainer(own, microbatches=2) as made, pytest.warns(RuntimeWarning):
        made.step(*batch(ROWS))
        made.step(*batch(ROWS))
        seen = len(starved_layer(own).seen)
        made.replan()
        made.step(*batch(ROWS))
        assert made.plan.settings.microbatches == 8
        assert max(starved_layer(own).seen[seen:]) <= 2 or not made.plan.recompute
    assert isinstance(made.plan, Plan)
