"""What a trace would not hold is one layer or refused, and what was recorded must stay."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, trainer
from test_model_traced import plain_pass
from torch import nn

from spu.cost.count import model_costs
from spu.model.layers import layers_by_tracing


class Bad(nn.Module):
    """Does one thing between its modules that no trace can hold."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("total", torch.zeros(()))
        self.calls = 0
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.what == "values":
            x = x if x.sum() > 0 else -x
        if self.what == "mode":
            x = F.dropout(x, 0.5, self.training)
        if self.what == "no_grad":
            with torch.no_grad():
                x = x * 2
        if self.what == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = x * 2
        if self.what == "draw":
            x = x * torch.rand(8)
        if self.what == "python draw":
            x = x * random.random()
        if self.what == "buffer":
            self.total.add_(x.detach().sum())
            return self.second(x) + self.total
        if self.what == "counter":
            self.calls += 1
        if self.what == "type":
            x = x * 2 if isinstance(x, torch.Tensor) else x
        if self.what == "function":
            x = Doubled.apply(x)
        return self.second(x) * self.scale


class Stateful(Bad):
    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 3


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("values", r"cannot be used as inputs to control flow \(line \d+ of .*test_model_tracing.py, in forward\)"),
        ("mode", "something else in evaluation mode"),
        ("no_grad", "switches gradients, inference mode or autocast"),
        ("autocast", "switches gradients, inference mode or autocast"),
        ("draw", "makes or holds a tensor"),
        ("python draw", "draws random numbers between modules"),
        ("buffer", "uses buffer 'total' in several places"),
        ("counter", "changes attributes of the model"),
        ("type", "computes something else"),
        ("function", "switches gradients"),
        ("state", "keeps a state of its own"),
    ],
)
def test_what_a_trace_cannot_hold_is_refused_by_name(what: str, reason: str) -> None:
    model = Stateful(what) if what == "state" else Bad(what)
    state = copy.deepcopy(vars(model))
    with trainer(model) as t, pytest.raises(ValueError, match=f"cannot be cut into layers: .*{reason}.*as a list"):
        t.step(*batch())
    assert (model.calls, model.training) == (state["calls"], True)
    assert model.total == 0


class Within(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner = Bad(what)
        self.inner.more = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(2))  # would be looked into
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


@pytest.mark.parametrize("what", ["values", "mode", "no_grad", "buffer", "type", "function", "counter"])
@pytest.mark.usefixtures("reference")
def test_a_module_in_which_a_trace_would_not_be_exact_is_one_layer(what: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = Within(what), batch()
    plain = copy.deepcopy(model).eval()
    with trainer(model, recompute=False) as t:
        with torch.no_grad():  # each microbatch decides for itself
            expected = sum(F.cross_entropy(plain(x[i : i + 2]), y[i : i + 2]).item() for i in range(0, 8, 2)) / 4
        assert t.evaluate(x, y) == pytest.approx(expected, abs=1e-6)
        loss, _ = t.forward_backward(x, y)
    if what != "mode":
        plain.train()
        assert_equal(loss, plain_pass(plain, x, y, 4, F.cross_entropy), "loss")
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                assert_equal(ours.grad, theirs.grad, "gradient")


def test_costs_of_the_layers_add_up_to_the_models() -> None:
    model = Bad("")
    layers = layers_by_tracing(model, batch(2)[0])
    assert [layer.name for layer in layers] == ["first", "second"]
    costs, _ = model_costs(layers, batch(2)[0], torch.float32)
    assert sum(cost.param_count for cost in costs) == sum(p.numel() for p in model.parameters())
    assert sum(cost.forward_flops for cost in costs) == 2 * 2 * (6 * 8 + 8 * 4)


def test_a_value_that_was_recorded_must_stay() -> None:
    model = Bad("")
    with trainer(model) as t:
        t.step(*batch())
        model.scale = 2.0
        with pytest.raises(Exception, match="'scale' was changed after this trainer prepared"):
            t.step(*batch())
        model.scale = 1.0
        t.step(*batch())
        handle = model.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="the model .* has a hook"):
            t.step(*batch())
        handle.remove()


def test_a_hook_on_the_model_and_parts_by_hand_are_refused() -> None:
    model = Bad("")
    with trainer(model) as t:
        assert len(list(t.parameters())) == 4
        with pytest.raises(ValueError, match=r"layers of a Bad are found on a first batch: call prepare"):
            list(t.modules())
        model.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="it has a hook"):
            t.step(*batch())
    with pytest.raises(ValueError, match="fails on the first batch"), trainer(Bad("")) as t:
        t.step(torch.randn(8, 5), batch()[1])


class Scaled(nn.Module):
    """Uses buffers between its modules, and has tensors that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(2, 2)
        self.idle = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("rest", torch.randn(2))
        self.register_buffer("table", torch.randn(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x - self.mean) * self.table
        x = self.second(x)
        self.seen.add_(x.detach().sum())
        return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("reference")
def test_buffers_between_modules_and_state_that_nothing_uses(recompute: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, (x, y) = Scaled(), batch()
    plain = copy.deepcopy(model)
    with trainer(model, recompute=recompute) as t:
        for _ in range(2):
            loss, _ = t.forward_backward(x, y)
            plain.zero_grad()
            assert_equal(loss, plain_pass(plain, x, y, 4, F.cross_entropy), "loss")
            assert_equal(model.first.weight.grad, plain.first.weight.grad, "gradient")
            assert_equal(model.seen, plain.seen, "buffer")
        model.mean.mul_(2)
        plain.mean.mul_(2)
        assert_equal(t.forward_backward(x, y)[0], plain_pass(plain, x, y, 4, F.cross_entropy), "loss after a change")
        t.save(tmp_path / "saved")
        other = Scaled()
        with trainer(other) as again:
            again.prepare(x, y)
            again.load(tmp_path / "saved")
            for name, value in other.state_dict().items():
                assert_equal(value, model.state_dict()[name], name)
        assert [name for name, _ in model.named_buffers()] == ["mean", "seen", "rest", "table"]
        model.mean = torch.zeros(6)
        with pytest.raises(Exception, match="buffer 'mean' was replaced"):
            t.step(x, y)
