"""The update: learning rates, the user's own optimizers, Ctrl-C and failures in the midst of it."""

from __future__ import annotations

import functools
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, mlp
from test_trainer_edits import make
from torch import nn

from spu import ModelParallelTrainer
from spu.checkpoint.writing import CheckpointError
from spu.engine import update
from spu.optim.adamw import AdamW

pytestmark = pytest.mark.usefixtures("one_thread")


class Makes:
    """A factory that keeps what it made."""

    def __init__(self, lr: float = 0.1) -> None:
        self.lr, self.made = lr, []  # type: float, list[torch.optim.Optimizer]

    def __call__(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        self.made.append(torch.optim.SGD(parameters, lr=self.lr))
        return self.made[-1]


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, momentum=0.9),
        functools.partial(AdamW, weight_decay=0.0),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ],
    ids=["partial", "partial of ours", "function"],
)
def test_a_rate_that_would_be_ignored_is_refused(optimizer: Any) -> None:
    """The run went on with the optimizer's default, 0.001."""
    model = mlp()
    with make(model, optimizer=optimizer, lr=123.0) as trainer, pytest.raises(ValueError, match=r"lr=123.0 would be"):
        trainer.step(*batch())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_torch_scheduler_and_the_trainers_schedule_multiply(tmp_path: Path) -> None:
    """A rate that a scheduler had set was overwritten at the next step."""
    factory, seen = Makes(), []
    with make(mlp(), optimizer=factory, lr=None, lr_schedule=lambda step: 0.5 if step else 1.0) as trainer:
        trainer.prepare(*batch())
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1) for optimizer in factory.made]
        factory.made[0].register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        for _ in range(3):
            trainer.step(*batch())
            for scheduler in schedulers:
                scheduler.step()
        assert seen == pytest.approx([0.1, 0.005, 0.0005])
        assert factory.made[1].param_groups[0]["lr"] == pytest.approx(1e-4)
        trainer.save(tmp_path / "checkpoint")
    again = Makes()
    with make(mlp(), 1, optimizer=again, lr=None) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert again.made[0].param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("factor", [float("nan"), -1.0, float("inf"), None, "half"])
def test_a_factor_that_is_no_number_of_0_or_more_is_refused(factor: Any) -> None:
    """NaN made every weight NaN; None ended in a TypeError of the multiplication."""
    model, given = mlp(), [factor, torch.tensor(0.5)]
    with make(model, 1, precision="fp32", lr_schedule=lambda step: given[0]) as trainer:
        trainer.prepare(*batch())
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=f"lr_schedule gave {factor!r}: it must return a factor of 0 or more"):
            trainer.step(*batch())
        assert all(map(torch.equal, before, model.parameters()))
        del given[0]
        trainer.step(*batch())
        assert not any(map(torch.equal, before, model.parameters()))


def test_a_rate_that_is_set_by_hand_holds() -> None:
    model, factory = mlp(), Makes()
    with make(model, optimizer=factory, lr=None, precision="fp32") as trainer:
        trainer.step(*batch())
        for optimizer in factory.made:
            optimizer.param_groups[0]["lr"] = 0.0
        before = model[0].weight.clone()
        trainer.step(*batch())
        assert_equal(model[0].weight, before)


def test_a_rate_that_nobody_changed_is_the_new_trainers(tmp_path: Path) -> None:
    with make(mlp(), lr=0.1) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
    with make(mlp(), lr=0.2) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert [o.param_groups[0]["lr"] for o in trainer._prepared().updater.optimizers] == [0.2, 0.2]


def test_stages_stay_where_a_scheduler_holds_their_optimizer() -> None:
    """Stages planned again have new optimizers, which it would not know."""
    factory = Makes()
    with make(mlp(), optimizer=factory, lr=None) as trainer:
        trainer.step(*batch())
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1) for optimizer in factory.made]
        trainer.step(*batch())
        trainer.replan()
        assert len(factory.made) == len(schedulers) == 2


# A module's own state


class Remembers(nn.Linear):
    history: tuple[Any, ...] = ()

    def get_extra_state(self) -> Any:
        return {"history": self.history, "scale": torch.tensor([2.0])}

    def set_extra_state(self, state: Any) -> None:
        self.history, self.scale = state["history"], state["scale"]


def test_extra_state_is_saved_and_is_in_the_models_state(tmp_path: Path) -> None:
    """It was left out: a resumed run began with none, and load_state_dict missed it."""
    model = mlp(Remembers(16, 16))
    with make(model) as trainer:
        trainer.step(*batch())
        model[1].history = (1, "two", 0.5, None)
        trainer.save(tmp_path / "checkpoint")
        mlp(Remembers(16, 16)).load_state_dict(trainer.state_dict_for_model())
        model[1].history = (object(),)
        with pytest.raises(CheckpointError, match="1._extra_state/history/0 holds a object"):
            trainer.save(tmp_path / "other")
    fresh = mlp(Remembers(16, 16))
    with make(fresh, 1) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
    assert fresh[1].history == (1, "two", 0.5, None)
    assert_equal(fresh[1].scale, torch.tensor([2.0]))


def test_hooks_on_the_state_dict_run() -> None:
    model = mlp()
    model._register_state_dict_hook(
        lambda module, state, prefix, _: state.update({"renamed": state.pop("0.weight")})  # type: ignore[arg-type]
    )
    with make(model) as trainer:
        trainer.step(*batch())
        state = trainer.state_dict_for_model()
    assert set(state) == {"renamed", "0.bias", "2.weight", "2.bias"}
    assert state["renamed"].dtype == torch.float32


# An update happens as a whole


class Slow(AdamW):
    """Ctrl-C arrives while it works."""

    pressed = False

    def step(self, *args, **kwargs):
        if not Slow.pressed:
            Slow.pressed = True
            signal.raise_signal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else (
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            )
            time.sleep(0.1)
        return super().step(*args, **kwargs)


def test_an_update_that_ctrl_c_falls_into_is_whole(ctrl_c: None) -> None:
    """Half of the stages were a step ahead, the step was not counted, and gradients were left."""
    Slow.pressed = False
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(2)]
    before = [p.detach().clone() for layer in layers for p in layer.parameters()]
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    with ModelParallelTrainer(
        layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, optimizer=Slow, lr=0.1
    ) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.step(x, y)
        assert Slow.pressed
        assert trainer.steps_done == 1
        assert all(p.grad is None for p in trainer.parameters())
        assert all(not torch.equal(p, old) for p, old in zip(trainer.parameters(), before, strict=True))
        trainer.step(x, y)
        assert trainer.steps_done == 2


def test_an_update_that_fails_half_way_asks_for_a_checkpoint(tmp_path: Path) -> None:
    class Fails(AdamW):
        def step(self, *args, **kwargs):
            if armed and threading.current_thread().name.startswith("spu cpu:1"):
                raise ArithmeticError("no memory for moments")
            return super().step(*args, **kwargs)

    armed: list[int] = []
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    with ModelParallelTrainer(
        [nn.Linear(4, 4), nn.Linear(4, 4)], ["cpu:0", "cpu:1"], microbatches=2, optimizer=Fails, lr=0.1
    ) as trainer:
        trainer.step(x, y)
        trainer.save(tmp_path / "checkpoint")
        armed.append(1)
        with pytest.raises(RuntimeError, match="no memory for moments"):
            trainer.step(x, y)
        armed.clear()
        assert all(p.grad is None for p in trainer.parameters())
        with pytest.raises(RuntimeError, match="an update failed half-way .*: load a checkpoint"):
            trainer.step(x, y)
        trainer.load(tmp_path / "checkpoint")
        trainer.step(x, y)
        assert trainer.steps_done == 2


def test_what_products_left_to_the_norm_raises_the_scalers_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that no kernel has told of: an update of the user's own asks the scaler, not the norm."""
    x, y = batch()

    def spoil(parameter: torch.Tensor) -> None:
        parameter.grad[0].fill_(float("inf"))  # type: ignore[index]

    for left in (False, True):
        monkeypatch.setattr(update, "_looks_cost", lambda device, left=left: left)
        model = mlp()
        trainer = make(model, precision="fp16")
        trainer.forward_backward(x, y)
        assert trainer.scaler.found_inf().item() == 0
        handle = model[0].weight.register_post_accumulate_grad_hook(spoil)
        trainer.forward_backward(x, y)
        assert trainer.scaler.found_inf().item() == int(left)
        handle.remove()
        trainer.forward_backward(x, y)
        assert trainer.scaler.found_inf().item() == 0, "of this step alone"
        trainer.close()


def _decayed_by_shape(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in parameters if p.dim() == n], "weight_decay": 0.5 * (n == 2)} for n in (1, 2)]
    return AdamW(groups, lr=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_our_optimizer_with_groups_of_parameters_streams_with_the_bits_of_a_resident_run(
    precision: str, tmp_path: Path
) -> None:
    """A function that makes spu.optim.AdamW was refused there, with the advice to take spu.optim.AdamW."""
    found = []
    for more in ({}, {"residency": "streamed", "tiers": f"disk={tmp_path}/spill:1GB"}):
        model = mlp()
        with make(model, 1, optimizer=_decayed_by_shape, lr=None, precision=precision, **more) as trainer:
            losses = [float(trainer.step(*batch()).loss) for _ in range(3)]
            trainer.save(tmp_path / precision)
            state = trainer.state_dict_for_model()
        found.append((losses, state))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert_equal(found[1][1][name], value, name)
    with make(mlp(), 1, optimizer=_decayed_by_shape, lr=None, precision=precision) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / precision)
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, found[0][1][name], name)
