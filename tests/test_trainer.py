"""The trainer's own promises: the scaled step, optimizers, checkpoints, failures."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, devices, layers
from torch import nn

import spu
from spu import LossScaler, ModelParallelTrainer
from spu.checkpoint.writing import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


# The step


@pytest.mark.parametrize("bad_layer", [0, 1, 3])
def test_an_overflow_at_any_stage_skips_everywhere_and_halves_the_scale(bad_layer: int) -> None:
    model = nn.Sequential(*layers())
    x, y = batch()
    with ModelParallelTrainer(model, devices(3), microbatches=4, lr=0.1) as trainer:
        before = trainer.step(x, y)
        assert not before.skipped
        assert before.loss_scale == 2.0**16
        state = {name: value.clone() for name, value in trainer.state_dict_for_model().items()}
        linear = model[bad_layer] if bad_layer != 1 else model[1][1]
        hook = linear.register_forward_hook(lambda module, inputs, out: _Overflow.apply(out))
        result = trainer.step(x, y)
        hook.remove()
        assert result.skipped
        assert not torch.isfinite(torch.tensor(result.grad_norm))
        assert trainer.scaler.get_scale() == 2.0**15
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, state[name], name)
        after = trainer.step(x, y)
        assert not after.skipped
        assert after.loss_scale == 2.0**15
        assert after.loss < before.loss


def test_an_update_of_ones_own_can_lower_the_scale_and_need_not_keep_outputs() -> None:
    model = nn.Sequential(*layers())
    with ModelParallelTrainer(model, devices(2), microbatches=4) as trainer:
        assert trainer.forward_backward(*batch(), keep_outputs=False)[1] is None
        assert trainer.scaler.found_inf().item() == 0
        hook = model[0].register_forward_hook(lambda module, inputs, out: _Overflow.apply(out))
        trainer.forward_backward(*batch())
        hook.remove()
        assert trainer.scaler.found_inf().item() == 1
        trainer.scaler.update()
        assert trainer.scaler.get_scale() == 2.0**15
        trainer.forward_backward(*batch())
        assert trainer.scaler.found_inf().item() == 0


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.inf)


def test_the_scale_grows_after_the_interval() -> None:
    scaler = LossScaler(init_scale=8.0, growth_interval=3)
    with ModelParallelTrainer(nn.Sequential(*layers()), devices(2), microbatches=2, scaler=scaler) as trainer:
        scales = [trainer.step(*batch(seed=step)).loss_scale for step in range(7)]
    assert scales == [8, 8, 8, 16, 16, 16, 32]


@pytest.mark.parametrize("stages", [1, 3])
def test_clipping_uses_one_norm_over_all_stages(stages: int) -> None:
    model = nn.Sequential(*layers())
    plain = copy.deepcopy(model)
    x, y = batch()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    with ModelParallelTrainer(
        model, devices(stages), precision="fp32", microbatches=2, optimizer=torch.optim.SGD, lr=0.5, max_grad_norm=0.05
    ) as trainer:
        result = trainer.step(x, y)
    F.cross_entropy(plain(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    optimizer.step()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        torch.optim.Adagrad,
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.99),
        functools.partial(spu.optim.AdamW, lr=0.01, weight_decay=0.0),
    ],
    ids=["ours", "class", "partial", "partial of ours"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_optimizer_trains(optimizer: object, precision: str) -> None:
    with ModelParallelTrainer(
        nn.Sequential(*layers()), devices(2), precision=precision, microbatches=2, optimizer=optimizer, lr=0.01
    ) as trainer:
        losses = [trainer.step(*batch()).loss for _ in range(15)]
    assert losses[-1] < losses[0] - 0.05
    dtype = torch.float16 if precision == "fp16" else torch.float32
    assert all(p.dtype == dtype for p in trainer.parameters())


def test_the_lr_schedule_multiplies_the_rate() -> None:
    model = nn.Sequential(*layers())
    start = copy.deepcopy(model.state_dict())
    with ModelParallelTrainer(
        model, devices(2), precision="fp32", microbatches=2, lr=0.1, lr_schedule=lambda step: float(step > 0)
    ) as trainer:
        trainer.step(*batch())
        for name, value in model.state_dict().items():
            assert_equal(value, start[name], name)
        trainer.step(*batch())
    assert not torch.equal(model[0].weight, start["0.weight"])


def test_frozen_parameters_stay() -> None:
    model = nn.Sequential(*layers())
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    with ModelParallelTrainer(model, devices(2), precision="fp32", microbatches=2, lr=0.1) as trainer:
        losses = [trainer.step(*batch()).loss for _ in range(5)]
    assert_equal(model[0].weight, before)
    assert losses[-1] < losses[0]


def test_evaluate_is_the_plain_mean_loss_and_changes_nothing() -> None:
    model = nn.Sequential(*layers(), nn.Dropout(0.5))
    x, y = batch(rows=7)
    with ModelParallelTrainer(model, devices(2), precision="fp32", microbatches=4) as trainer:
        loss = trainer.evaluate(x, y)
        assert trainer.evaluate(x[:2], y[:2]) > 0  # fewer rows than microbatches
        assert all(module.training for module in model.modules())
    model.eval()
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_pytrees_cross_the_stages() -> None:
    class Split(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return x["a"] * 2, {"mask": x["a"] > 0, "skip": x["a"] + 1}

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
            return self.linear((x[0] + x[1]["skip"]) * x[1]["mask"])

    torch.manual_seed(0)
    embed, join = nn.Linear(6, 6), Join()

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = embed

        def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"a": self.linear(x["a"])}

    model = [Embed(), Split(), join]
    plain = copy.deepcopy(nn.Sequential(*model))
    x, y = batch()
    with ModelParallelTrainer(model, devices(3), precision="fp32", microbatches=1) as trainer:
        trainer.forward_backward({"a": x}, y)
    F.cross_entropy(plain({"a": x}), y).backward()
    assert_equal(embed.weight.grad, plain[0].linear.weight.grad)


# Checkpoints


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam], ids=["ours", "torch"])
def test_a_checkpoint_resumes_bit_identically_on_another_number_of_stages(
    tmp_path: Path, precision: str, optimizer: object
) -> None:
    def make(stages: int) -> ModelParallelTrainer:
        return ModelParallelTrainer(
            nn.Sequential(*layers(), nn.Dropout(0.3)),
            devices(stages),
            precision=precision,
            microbatches=2,
            optimizer=optimizer,
            lr=0.02,
        )

    with make(2) as trainer:
        for step in range(3):
            trainer.step(*batch(seed=step))
        trainer.save(tmp_path / "checkpoint", extra={"note": [1, "two"]})
        expected = [trainer.step(*batch(seed=step)).loss for step in range(3, 6)]
        final = trainer.state_dict_for_model()
    with make(3) as trainer:
        trainer.prepare(*batch())
        assert trainer.load(tmp_path / "checkpoint") == {"note": [1, "two"]}
        assert trainer.steps_done == 3
        assert [trainer.step(*batch(seed=step)).loss for step in range(3, 6)] == expected
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, final[name], name)


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    with ModelParallelTrainer(nn.Sequential(*layers()), devices(2), microbatches=2) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
    for other in ([*layers()[:3], nn.Linear(16, 5)], [*layers(), nn.Linear(4, 4)]):
        with ModelParallelTrainer(nn.Sequential(*other), devices(2), microbatches=2) as trainer:
            trainer.prepare(*batch())
            before = trainer.state_dict_for_model()
            with pytest.raises(CheckpointError, match="another model"):
                trainer.load(tmp_path / "checkpoint")
            for name, value in trainer.state_dict_for_model().items():
                assert_equal(value, before[name], name)
    with pytest.raises(CheckpointError, match="nothing"), trainer:
        trainer.load(tmp_path / "nothing")


def test_a_forced_backend_reaches_the_workers() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(spu.ops.forced_backend())
            return x * 1.0

    with spu.use_backend("reference"):
        trainer = ModelParallelTrainer([nn.Linear(6, 4), Spy()], devices(2), microbatches=2)
    with trainer:
        trainer.step(*batch())
    assert set(seen[-2:]) == {"reference"}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_compare_sets_the_measured_step_beside_the_predicted_one(schedule: str) -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    x, y = torch.randn(4, 8), torch.randint(8, (4,))
    with ModelParallelTrainer(
        layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, schedule=schedule
    ) as trainer:
        with pytest.raises(RuntimeError, match="no step has run yet"):
            trainer.compare()
        trainer.step(x, y)
        rows = {line.split("  ")[0].strip(): line for line in trainer.compare().splitlines()}
    assert "predicted" in rows[""]
    assert "measured" in rows[""]
    assert f"{100 * trainer.timeline().idle_share:.1f}%" in rows["idle share"]
    assert {"step", "pipeline", "cpu:0 works", "cpu:1 works"} <= rows.keys()
