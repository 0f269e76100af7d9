"""spu.GradScaler in ordinary training loops: the same loop with torch's class is what it must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_equal
from torch import Tensor, nn

import spu
from spu.ops import sink, use_backend

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
BAD_STEP = 2


class Net(nn.Module):
    """Fused layers, plain ones, and a weight that is used both ways."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.LayerNorm(8))
        self.head = nn.Linear(8, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def batches(steps: int = 5) -> Iterator[tuple[int, list[Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        yield step, [torch.randint(32, (4, 6), generator=generator) for _ in range(2)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def train(
    scaler_class: type, model: nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer], clip: bool,
    set_to_none: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The loop of torch's documentation, with accumulation; one step's loss overflows."""
    optimizer = make_optimizer(model.parameters())
    scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=2)
    scales, norms = [], []
    for step, parts in batches():
        optimizer.zero_grad(set_to_none=set_to_none)
        for ids in parts:
            loss = loss_of(model, ids) / len(parts)
            if step == BAD_STEP:
                loss = loss * 1e38
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"scales": scales, "norms": norms, "state": scaler.state_dict(), "scaler": scaler}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_loop_equals_torchs_bit_for_bit(name: str, clip: bool, set_to_none: bool) -> None:
    """In fp32 on the reference backend: scales are powers of two, so that scaling rounds nothing."""
    plain = Net(tied=False)  # a tied weight's uses add in another order
    fused = spu.accelerate(copy.deepcopy(plain))
    with use_backend("reference"):
        ours = train(spu.GradScaler, fused, OPTIMIZERS[name], clip, set_to_none)
    torchs = train(torch.amp.GradScaler, plain, OPTIMIZERS[name], clip, set_to_none)
    assert ours["scales"] == torchs["scales"] == [1024, 2048, 1024, 1024, 2048]
    assert ours["state"] == torchs["state"]
    for a, b in zip(ours["norms"], torchs["norms"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    for (key, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        if clip:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert_equal(a, b, key)


@every_backend
@pytest.mark.parametrize("scaler_class", [spu.GradScaler, torch.amp.GradScaler])
def test_our_optimizer_follows_torchs_in_the_same_loop(backend: str, scaler_class: type) -> None:
    plain = Net()
    fused = spu.accelerate(copy.deepcopy(plain))
    with use_backend(backend):
        ours = train(scaler_class, fused, lambda p: spu.optim.AdamW(p, lr=0.01), clip=True)
    torchs = train(torch.amp.GradScaler, plain, OPTIMIZERS["adamw"], clip=True)
    assert ours["scales"] == torchs["scales"]
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_under_autocast_are_as_exact_as_torchs(backend: str, dtype: torch.dtype) -> None:
    """fp32 parameters, 16-bit compute; the weights' sinks serve all the same."""
    plain = Net()
    fused, truth = spu.accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    ids = next(batches())[1][0]
    loss_of(truth, ids).backward()
    for model, scaler_class in ((plain, torch.amp.GradScaler), (fused, spu.GradScaler)):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_class("cpu", init_scale=1024.0)
        with torch.autocast("cpu", dtype=dtype), use_backend(backend if model is fused else None):
            loss = loss_of(model, ids)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    for (name, a), b, true in zip(fused.named_parameters(), plain.parameters(), truth.parameters(), strict=True):
        ours, torchs = ((p.grad.double() - true.grad).norm() / true.grad.norm() for p in (a, b))
        assert a.grad.dtype == torch.float32
        assert ours <= 2 * torchs + torch.finfo(dtype).eps, (name, float(ours), float(torchs))
    assert sink.sink_of(fused.head.weight) is not None
    assert sink.sink_of(fused.body[0].bias) is not None


@pytest.mark.parametrize("overflowing", [0, 1])
def test_an_overflow_skips_its_own_optimizer_alone(overflowing: int) -> None:
    models = [spu.accelerate(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    scaler = spu.GradScaler("cpu", init_scale=2.0**8)
    for bad in (False, True, False):  # flags of the second step must not outlive it
        before = [[p.detach().clone() for p in model.parameters()] for model in models]
        losses = []
        for i, model in enumerate(models):
            optimizers[i].zero_grad()
            y = model(torch.randn(3, 4)).square().sum()
            losses.append(y * float("inf") if bad and i == overflowing else y)
        for loss in scaler.scale(losses):
            loss.backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for i, model in enumerate(models):
            moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before[i], strict=True))
            assert moved == (not (bad and i == overflowing)), (bad, i)
    assert scaler.get_scale() == 2.0**7


def test_a_gradient_that_was_thrown_away_is_forgotten() -> None:
    """Two networks, as in adversarial training: what the first loss leaves in the second's gradients is discarded."""
    model = spu.accelerate(nn.Sequential(nn.Linear(4, 4)))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), spu.GradScaler("cpu")
    for _ in range(2):
        before = model[0].weight.detach().clone()
        scaler.scale(model(torch.randn(2, 4)).sum() * float("inf")).backward()
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(model[0].weight).all()
        assert not torch.equal(model[0].weight, before)


def test_gradients_of_fused_parameters_are_at_true_scale_at_once() -> None:
    model = spu.accelerate(nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)))
    x, optimizer = torch.randn(3, 4), torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    true = [p.grad.clone() for p in model.parameters()]
    scaler = spu.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    for p, grad, factor in zip(model.parameters(), true, (1, 4, 4), strict=True):
        torch.testing.assert_close(p.grad, grad * factor)
    scaler.unscale_(optimizer)
    for p, grad in zip(model.parameters(), true, strict=True):
        torch.testing.assert_close(p.grad, grad)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)


def test_gradients_from_before_the_first_fused_backward_are_unscaled_too() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x, scaler = torch.randn(3, 4), spu.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(layer(x).sum()).backward()  # plain: arrives scaled
    scaler.scale(spu.accelerate(layer)(x).sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum(0).expand(4, 4))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_16_bits_trains(backend: str, dtype: torch.dtype) -> None:
    """torch's class refuses these ("Attempting to unscale FP16 gradients")."""
    torch.manual_seed(1)
    model = spu.accelerate(Net()).to(dtype)
    optimizer, scaler = spu.optim.AdamW(model.parameters(), lr=0.01), spu.GradScaler("cpu", init_scale=2.0**12)
    ids, losses = next(batches())[1][0], []
    with use_backend(backend):
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, ids)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert scaler.get_scale() == 2.0**12


def test_a_gradient_changed_by_hand_is_looked_at_again() -> None:
    """As torch does: what was put in after the backward counts, and what was taken out does not."""
    layer, x = spu.accelerate(nn.Linear(2, 2)), torch.ones(1, 2)
    scaler, optimizer = spu.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(layer.parameters(), lr=0.1)

    def step(factor: float, change: Callable[[Tensor], Any]) -> bool:
        """Whether the weights moved."""
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(layer(x).sum() * factor).backward()
        change(layer.weight)
        change(layer.bias)
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(layer.weight).all()
        return not torch.equal(layer.weight, before)

    def replace(param: Tensor) -> None:
        param.grad = param.grad * float("inf")

    assert step(1.0, lambda param: None)
    assert not step(1.0, lambda param: param.grad.fill_(float("nan")))
    assert not step(1.0, replace)
    assert step(float("inf"), lambda param: param.grad.zero_().add_(1))
    assert step(1.0, lambda param: None)
    assert scaler.get_scale() == 16


@pytest.mark.parametrize("name", ["grad", "backward"])
def test_a_backward_for_the_input_alone_leaves_the_weights_gradients(name: str) -> None:
    """Adversarial training: a gradient of the input, then one of the weights."""
    plain = nn.Linear(3, 3)
    layer, gradients = spu.accelerate(copy.deepcopy(plain)), []
    for model, scaler in ((plain, torch.amp.GradScaler("cpu", 8.0)), (layer, spu.GradScaler("cpu", 8.0))):
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(2, 3, requires_grad=True)
        for _ in range(2):  # the second step's weights have their sinks
            optimizer.zero_grad()
            loss = scaler.scale(model(x).sum())
            if name == "grad":
                (dx,) = torch.autograd.grad(loss, [x])
            else:
                loss.backward(inputs=[x])
                dx, x.grad = x.grad, None
            assert model.weight.grad is model.bias.grad is None
            x = (x + 0.1 * dx / scaler.get_scale()).detach().requires_grad_()
            scaled = torch.autograd.grad(scaler.scale(model(x).sum()), [model.weight])[0]
            scaler.scale(model(x).sum()).backward()
            scaler.unscale_(optimizer)
            gradients.append([dx, scaled, model.weight.grad, model.bias.grad])
            scaler.update()
    for torchs, ours in zip(gradients[:2], gradients[2:], strict=True):
        for a, b in zip(ours, torchs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_a_transposed_weights_gradient_has_its_strides(fused: bool) -> None:
    """It was contiguous, which torch's fused optimizers on CPUs pair with other elements of the weight."""

    def train(transposed: bool) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        if transposed:
            model[0].weight.data = model[0].weight.data.t().contiguous().t()
        model = spu.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler, x = spu.GradScaler("cpu"), torch.randn(6, 8)
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.split(3):  # accumulated
                loss = model(part).square().mean()
                scaler.scale(loss).backward()
            assert model[0].weight.grad.stride() == model[0].weight.stride()
            scaler.step(optimizer)
            scaler.update()
        return loss.item(), model[0].weight.detach()

    (loss, weight), (expected_loss, expected) = train(True), train(False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
