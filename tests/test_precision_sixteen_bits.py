"""spu.GradScaler, parameters in 16 bits, and optimizers that do not know of main gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spu

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
NAMES = [
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor",
]  # fmt: skip
WAYS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"momentum": 0.9}]
CASES = [
    (name, way) for name in NAMES for way in WAYS
    if all(key in inspect.signature(getattr(torch.optim, name)).parameters for key in way)
]  # fmt: skip


def train(scaler: Any, name: str, way: dict[str, Any], accelerated: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    if accelerated:
        spu.accelerate(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **way)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(X.to(dtype)).float().square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize(("name", "way"), CASES, ids=str)
def test_bf16_parameters_train_with_torchs_optimizers(name: str, way: dict[str, Any], accelerated: bool) -> None:
    """Adam and its kin used to fail at the first step: they take gradients of the parameter's dtype alone."""
    plain = train(torch.amp.GradScaler("cpu", 64.0), name, way, False, torch.bfloat16)
    ours = train(spu.GradScaler("cpu", 64.0), name, way, accelerated, torch.bfloat16)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.02)  # two or three steps of 0.01


@pytest.mark.parametrize(("name", "way"), CASES, ids=str)
def test_fp16_parameters_train_or_are_refused_before_anything_moves(name: str, way: dict[str, Any]) -> None:
    """torch's scaler refuses fp16 parameters altogether. RMSprop's squares, kept in fp16, made NaN weights."""
    if name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta") or "fused" in way:
        with pytest.raises(TypeError, match=r"fp32 gradients: use spu.optim.AdamW"):
            train(spu.GradScaler("cpu", 64.0), name, way, True, torch.float16)
        return
    model = train(spu.GradScaler("cpu", 64.0), name, way, True, torch.float16)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_refused_step_leaves_weights_and_state_alone() -> None:
    layer = spu.accelerate(nn.Linear(4, 2)).half()
    optimizer, scaler = torch.optim.AdamW(layer.parameters()), spu.GradScaler("cpu", init_scale=8.0)
    before = layer.weight.detach().clone()
    scaler.scale(layer(X.half()).float().sum()).backward()
    with pytest.raises(TypeError, match=r"AdamW cannot update float16"):
        scaler.step(optimizer)
    assert torch.equal(layer.weight, before)
    assert not optimizer.state
    assert layer.weight.grad.dtype == torch.float32
    other = spu.optim.AdamW(layer.parameters())
    scaler.step(other)
    assert not torch.equal(layer.weight, before)


def test_an_optimizer_that_clears_its_gradients() -> None:
    layer = spu.accelerate(nn.Linear(4, 2)).bfloat16()
    optimizer, scaler = torch.optim.AdamW(layer.parameters()), spu.GradScaler("cpu", init_scale=8.0)
    dtypes = []
    optimizer.register_step_pre_hook(lambda o, *_: dtypes.append(layer.weight.grad.dtype))
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad())
    for _ in range(2):
        scaler.scale(layer(X.bfloat16()).float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert layer.weight.grad is None
    assert dtypes == [torch.bfloat16] * 2


def test_frozen_after_its_backward() -> None:
    layer = nn.Linear(4, 2).bfloat16()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), spu.GradScaler("cpu", init_scale=8.0)
    scaler.scale(layer(X.bfloat16()).float().sum()).backward()
    expected = layer.weight.grad.float() / 8
    layer.weight.requires_grad_(False)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(layer.weight.grad.float(), expected)
    scaler.step(optimizer)


def test_a_model_that_becomes_bf16_in_the_middle() -> None:
    layer = spu.accelerate(nn.Linear(4, 2))
    scaler = spu.GradScaler("cpu", init_scale=8.0)
    for x in (X, X.bfloat16()):
        layer.to(x.dtype).zero_grad()
        scaler.scale(layer(x).float().sum()).backward()
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight.grad, x.float().sum(0).expand(2, 4))


@pytest.mark.parametrize("hook", [None, "tensor", "post"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_is_used_without_a_fused_op_too(dtype: torch.dtype, hook: str | None) -> None:
    """In the backward that adopts it its other gradient may come first, in 16 bits: "hook has changed the type"."""

    def gradients(scaler: torch.amp.GradScaler, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)
        table, found = spu.accelerate(nn.Embedding(9, 8)).to(dtype), []
        if hook == "tensor":
            table.weight.register_hook(lambda grad: grad * 0.5)
        elif hook == "post":
            table.weight.register_post_accumulate_grad_hook(lambda weight: found.append(weight.grad.double()))
        for step in range(3):
            logits = torch.nn.functional.linear(table(torch.arange(6) + step), table.weight)  # a tied head by hand
            loss = nn.functional.cross_entropy(logits.double(), torch.arange(6))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer := torch.optim.SGD([table.weight], lr=0.0))
            found.append(table.weight.grad.double())
            scaler.step(optimizer)
            scaler.update()
            table.weight.grad = None
        return found

    exact = gradients(torch.amp.GradScaler("cpu", enabled=False), torch.float64)
    plain = gradients(torch.amp.GradScaler("cpu", enabled=False), dtype)
    ours = gradients(spu.GradScaler("cpu", 256.0), dtype)
    for i, (truth, other, found) in enumerate(zip(exact, plain, ours, strict=True)):
        assert (found - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-4 * truth.abs().max(), i


class Foreign(torch.optim.Optimizer):
    """As other libraries write Adam, with or without mixing dtypes, or a momentum."""

    def __init__(self, params: Any, kind: str) -> None:
        super().__init__(params, {"lr": 0.01} if kind == "momentum" else {"lr": 0.01, "eps": 1e-8})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["kept"] = torch.zeros_like(p, dtype=torch.float32 if self.kind == "wide" else p.dtype)
                if self.kind == "momentum":
                    p.sub_(state["kept"].mul_(0.9).add_(p.grad), alpha=group["lr"])
                    continue
                p.mul_(0.999)
                if self.kind == "lerp":
                    state["kept"].lerp_(p.grad.square(), 0.1)
                else:
                    state["kept"].addcmul_(p.grad, p.grad, value=0.1)
                p.sub_(p.grad / (state["kept"].sqrt() + group["eps"]), alpha=group["lr"])


@pytest.mark.parametrize("kind", ["wide", "momentum", "narrow", "lerp"])
def test_another_librarys_optimizer_trains_fp16_parameters_or_is_undone(kind: str) -> None:
    """schedulefree's AdamW made every weight infinite; timm's failed in a kernel, some of its weights moved."""
    torch.manual_seed(1)
    model = spu.accelerate(nn.Linear(4, 2)).half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, scaler = Foreign(model.parameters(), kind), spu.GradScaler("cpu", 64.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(model(X.half()).float().square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(float("inf"))  # skipped: there is nothing to see yet
    if kind in ("wide", "momentum"):
        for _ in range(3):
            step(1.0)
        assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.isfinite().all() for p in model.parameters())
        return
    with pytest.raises(TypeError, match=r"Foreign cannot update float16 .*use spu.optim.AdamW"):
        step(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(optimizer.state.values())
