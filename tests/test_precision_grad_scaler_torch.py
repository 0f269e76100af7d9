"""spu.GradScaler where torch's is expected: states, copies, closures, compiled models, hooks, checkpoints, devices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from numeric import assert_equal
from test_precision_grad_scaler import OPTIMIZERS, Net, batches, loss_of, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spu
from spu.ops import sink
from spu.precision import grad_scaler, parameter_sink


@pytest.mark.parametrize("since", ["the start", "the second step"])
def test_hooks_on_a_weight_see_what_they_see_in_torch(since: str) -> None:
    """The scaled gradient, which they may change."""
    x, gradients = torch.randn(4, 3), []
    plain = nn.Linear(3, 2)
    for model, cls in ((plain, torch.amp.GradScaler), (spu.accelerate(copy.deepcopy(plain)), spu.GradScaler)):
        optimizer, scaler, seen = torch.optim.SGD(model.parameters(), lr=0.0), cls("cpu", init_scale=16.0), []

        def mask(gradient: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(gradient.clone())
            return gradient.clamp(-8, 8)

        for turn in range(3):
            if turn == (0 if since == "the start" else 1):
                model.weight.register_hook(mask)
            optimizer.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        gradients.append([*seen, model.weight.grad, model.bias.grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_reentrant_checkpoint_is_right_or_refused(dtype: torch.dtype) -> None:
    """Its backward does not know the scale: from the second step on the gradients would be too large by it."""
    layer, x = spu.accelerate(nn.Linear(4, 1, bias=False)).to(dtype), torch.ones(2, 4, dtype=dtype, requires_grad=True)
    optimizer, scaler = spu.optim.AdamW(layer.parameters()), spu.GradScaler("cpu", init_scale=1024.0)
    for turn, reentrant in enumerate((True, False, True)):
        optimizer.zero_grad()
        loss = checkpoint(layer, x, use_reentrant=reentrant).sum()
        if turn < 2:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert_equal(layer.weight.grad, torch.full((1, 4), 2.0), f"turn {turn}")
            scaler.update()
        else:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                scaler.scale(loss).backward()
    optimizer.zero_grad()
    layer(x).sum().backward()  # a backward that failed leaves nothing behind
    assert_equal(layer.weight.grad, torch.full((1, 4), 2.0), "unscaled")


def test_parameters_on_another_device_than_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients' ops get the scale and a flag there. ("meta" stands for a second device.)"""
    devices: list[set[str]] = []

    def record(dz: Tensor, x: Tensor, into: spu.ops.MainGrad, *, backend: str) -> None:
        devices.append({tensor.device.type for tensor in (dz, x, *into[:3])})

    monkeypatch.setattr(parameter_sink, "linear_dw_", record)
    scaler, there = spu.GradScaler("cpu", init_scale=8.0), nn.Parameter(torch.empty(2, 3, device="meta"))
    x = torch.ones(3, requires_grad=True)

    def backward(_: Tensor) -> None:
        adopted = scaler._adopt(there)
        adopted.linear_weight(torch.empty(4, 2, device="meta"), torch.empty(4, 3, device="meta"), "reference")

    y = x * 1
    y.register_hook(backward)
    scaler.scale(y.sum()).backward()
    assert devices == [{"meta"}]


def test_two_scalers_have_no_common_backward() -> None:
    models = [spu.accelerate(nn.Linear(2, 1)) for _ in range(2)]
    scalers = [spu.GradScaler("cpu", init_scale=scale) for scale in (8.0, 1024.0)]
    losses = [scaler.scale(model(torch.ones(1, 2)).sum()) for scaler, model in zip(scalers, models, strict=True)]
    with pytest.raises(RuntimeError, match="two loss scales"):
        sum(losses).backward()
    models[1].zero_grad()
    first, second = scalers[0].scale([model(torch.ones(1, 2)).sum() for model in models])
    (first + second).backward()
    assert_equal(models[1].weight.grad, torch.ones(1, 2), "one scaler, two losses")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    scales = []
    for default in (torch.float32, dtype):
        model = spu.accelerate(Net()).float()
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            ours = train(spu.GradScaler, model, OPTIMIZERS["sgd"], clip=True)
            hidden = torch.randn(4, 8, dtype=torch.float32, requires_grad=True)
            spu.ops.linear_cross_entropy(hidden, model.head.weight, torch.tensor([1, 2, 3, 4])).backward()
            scaler = spu.LossScaler(2.0**16)
            assert scaler.get_scale() == 2.0**16
            assert scaler.found_inf().dtype == torch.float32
        finally:
            torch.set_default_dtype(before)
        scales.append(ours["scales"])
    assert scales[0] == scales[1]


def test_states_go_both_ways() -> None:
    ours, torchs = spu.GradScaler("cpu", init_scale=128.0), torch.amp.GradScaler("cpu")
    state = train(spu.GradScaler, Net(), OPTIMIZERS["sgd"], False)["state"]
    torchs.load_state_dict(state)
    ours.load_state_dict(torchs.state_dict())
    assert ours.state_dict() == torchs.state_dict() == state
    layer = spu.accelerate(nn.Linear(2, 2, bias=False))
    ours.scale(layer(torch.ones(1, 2)).sum()).backward()
    assert_equal(layer.weight.grad, torch.ones(2, 2), "the loaded scale, taken out again")


def test_copies_and_pickles() -> None:
    model = spu.accelerate(Net())
    scaler = train(spu.GradScaler, model, OPTIMIZERS["sgd"], False)["scaler"]
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert other.state_dict() == scaler.state_dict()
        other.scale(loss_of(model, next(batches())[1][0])).backward()


def test_disabled_does_nothing() -> None:
    layer, scaler = spu.accelerate(nn.Linear(3, 3)), spu.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = layer(torch.randn(2, 3)).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.state_dict() == {}
    assert sink.sink_of(layer.weight) is None


def test_closures_are_refused_as_torch_refuses_them() -> None:
    layer, scaler = spu.accelerate(nn.Linear(3, 3)), spu.GradScaler("cpu")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(layer(torch.randn(2, 3)).sum()).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 0.0)


@pytest.mark.leaks_threads  # the compiler's
def test_a_compiled_model_in_the_loop() -> None:
    """Its fused ops return ordinary gradients; those that are adopted elsewhere are still unscaled once."""
    model = spu.accelerate(nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)))
    x, scaler = torch.randn(3, 4), spu.GradScaler("cpu", init_scale=16.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    true = [p.grad.clone() for p in model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (compiled, model, compiled):  # the second adopts the weight
        optimizer.zero_grad()
        scaler.scale(run(x).square().sum()).backward()
        scaler.unscale_(optimizer)
        for p, grad in zip(model.parameters(), true, strict=True):
            torch.testing.assert_close(p.grad, grad)
        scaler.update()


def test_the_parts_of_torch_that_we_build_on_are_there() -> None:
    """Private names; if this fails, grad_scaler.py must follow the new torch."""
    from torch.amp.grad_scaler import OptState

    assert {"READY", "UNSCALED", "STEPPED"} <= set(OptState.__members__)
    scaler = torch.amp.GradScaler("cpu")
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
    scaler.scale(parameter.sum()).backward()
    found = scaler._unscale_grads_(optimizer, torch.tensor(0.5), torch.tensor(0.0), False)
    assert list(found) == [torch.device("cpu")]
    assert torch.optim.AdamW([parameter], fused=True)._step_supports_amp_scaling


@pytest.mark.parametrize("several_processes", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["backward", "grad"])
def test_a_backward_that_goes_on_from_a_scaled_gradient(
    way: str, dtype: torch.dtype, fused: bool, several_processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier stage's: from the second step on its 16-bit parameters kept the scale. The zero-bubble schedules of
    torch.distributed.pipelining put what torch.autograd.grad returns into ``grad``."""
    monkeypatch.setattr(grad_scaler, "_several_processes", lambda: several_processes)
    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)).to(dtype)
    plain, x = copy.deepcopy(parts).float(), torch.randn(4, 8).to(dtype)
    for part in parts:
        _ = spu.accelerate(part) if fused else part
    optimizer, scaler = spu.optim.AdamW(parts.parameters(), lr=0.0), spu.GradScaler("cpu", init_scale=1024.0)
    first = list(parts[0].parameters())
    for turn in range(3):
        for _ in range(2):  # microbatches
            h = parts[0](x)
            cut = h.detach().requires_grad_()
            scaler.scale(parts[1](cut).float().square().mean()).backward()
            if way == "backward":
                h.backward(cut.grad)
                continue
            for p, grad in zip(first, torch.autograd.grad(h, first, cut.grad), strict=True):
                p.grad = grad if p.grad is None else p.grad + grad
        scaler.unscale_(optimizer)
        plain.zero_grad()
        (2 * plain[1](plain[0](x.float())).square().mean()).backward()
        for ours, wanted in zip(parts.parameters(), plain.parameters(), strict=True):
            error = (ours.grad.float() - wanted.grad).norm() / wanted.grad.norm()
            assert error < 4 * torch.finfo(dtype).eps, f"turn {turn}: {error}"
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_a_backward_without_the_scale_is_divided_by_it_too() -> None:
    """As torch's class does it, before and after one that knows the scale."""
    gradients = []
    for cls in (torch.amp.GradScaler, spu.GradScaler):
        layer, seen = nn.Linear(3, 1, bias=False), []
        layer = spu.accelerate(layer) if cls is spu.GradScaler else layer
        optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.0), cls("cpu", init_scale=8.0)
        for order in ("scaled", "scaled other", "other scaled", "other", "scaled other scaled"):
            for kind in order.split():
                loss = layer(torch.ones(2, 3)).sum()
                (scaler.scale(loss) if kind == "scaled" else loss).backward()
            scaler.unscale_(optimizer)
            seen.append(layer.weight.grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        gradients.append(seen)
    for ours, wanted in zip(gradients[1], gradients[0], strict=True):
        assert_equal(ours, wanted)


@pytest.mark.parametrize("scale", [spu.GradScaler("cpu").scale, spu.LossScaler().scale], ids=["torch's", "ours"])
def test_a_scaled_loss_is_no_view(scale: Callable[[Tensor], Tensor]) -> None:
    """Zero-bubble schedules of torch.distributed.pipelining detach the loss in place, as they may torch's."""
    weight = nn.Parameter(torch.ones(2))
    loss = scale(weight.sum())
    assert not loss._is_view()
    (grad,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.detach_()
    assert grad[0] == loss / 2


@pytest.mark.parametrize("emptied", [True, False], ids=["to none", "to zeros"])
@pytest.mark.parametrize("by_hand", ["set", "added"])
@pytest.mark.parametrize("before", ["a step", "a backward without a step", "a backward of the same update"])
def test_gradients_of_autograd_grad_are_scaled_whatever_came_before(before: str, by_hand: str, emptied: bool) -> None:
    """After a backward whose update was left out they kept the scale, 256 times too large, in silence."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)), torch.randn(5, 4)
    updated = []
    for model, cls in ((plain, torch.amp.GradScaler), (spu.accelerate(copy.deepcopy(plain)), spu.GradScaler)):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), cls("cpu", init_scale=256.0)
        weights = list(model.parameters())
        for turn in ("first", "by hand", "last"):
            if turn != "by hand" or before != "a backward of the same update":
                optimizer.zero_grad(set_to_none=emptied)
            loss = scaler.scale(model(x).square().mean())
            if turn != "by hand":
                loss.backward()
                if turn == "first" and before != "a step":
                    continue
            else:
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    if by_hand == "set" or weight.grad is None:
                        weight.grad = gradient
                    else:
                        weight.grad += gradient
            scaler.step(optimizer)
            scaler.update()
        updated.append(weights)
    for theirs, ours in zip(*updated, strict=True):
        torch.testing.assert_close(ours, theirs)
