"""What users do to gradients: put there, zeroed, repaired, hooked, from several threads. torch is the truth."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from together import together
from torch import Tensor, nn

import spu
from spu.ops import use_backend
from spu.ops.sink import sink_of
from spu.precision import LossScaler, MainGrads

INF = float("inf")
BOTH = [torch.amp.GradScaler, spu.GradScaler]
X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def layer_of(scaler_class: type) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    return spu.accelerate(layer) if scaler_class is spu.GradScaler else layer


def in_both(run: Callable[[type, nn.Linear, Any, torch.optim.Optimizer], Any]) -> list[Any]:
    """[torch's, ours] of a loop; gradients of the fused layer have their sinks from a step before it."""
    results = []
    with use_backend("reference"):
        for scaler_class in BOTH:
            layer = layer_of(scaler_class)
            optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), scaler_class("cpu", init_scale=16.0)
            scaler.scale(layer(X).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            returned = run(scaler_class, layer, scaler, optimizer)
            results.append([returned, scaler.get_scale(), layer.weight.detach(), layer.bias.detach()])
    return results


def assert_same(results: list[Any], scale: float) -> None:
    torchs, ours = results
    assert ours[:2] == torchs[:2]
    assert ours[1] == scale
    assert_equal(ours[2], torchs[2], "weight")
    assert_equal(ours[3], torchs[3], "bias")


REPAIRS: dict[str, Callable[[nn.Linear, torch.optim.Optimizer], Any]] = {
    "zero_grad": lambda layer, optimizer: optimizer.zero_grad(set_to_none=False),
    "zero_": lambda layer, optimizer: [p.grad.zero_() for p in layer.parameters()],
    "zeros": lambda layer, optimizer: [setattr(p, "grad", torch.zeros_like(p)) for p in layer.parameters()],
    "none": lambda layer, optimizer: optimizer.zero_grad(),
    "nan_to_num_": lambda layer, optimizer: [p.grad.nan_to_num_(0, 0, 0) for p in layer.parameters()],
    "data.nan_to_num_": lambda layer, optimizer: [p.grad.data.nan_to_num_(0, 0, 0) for p in layer.parameters()],
}


@pytest.mark.parametrize(
    ("repair", "good_backward"),
    [(repair, good) for repair in REPAIRS for good in (True, False) if good or repair != "none"],
)
def test_an_overflow_does_not_outlive_its_gradient(repair: str, good_backward: bool) -> None:
    """A bad batch is left out: its flag used to skip the step of the good one, and to halve the scale."""

    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        scaler.scale(layer(X * INF).sum()).backward()
        REPAIRS[repair](layer, optimizer)
        if good_backward:
            scaler.scale(layer(X).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    assert_same(in_both(run), 16)


def test_an_overflow_lasts_as_long_as_its_gradient() -> None:
    """No zero_grad after a skipped step: update() used to forget the overflow, and infinities reached the weights."""

    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        scales = []
        for factor in (INF, 1.0, 1.0):
            scaler.scale(layer(X).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        optimizer.zero_grad()
        scaler.scale(layer(X).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return scales

    assert_same(in_both(run), 2)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda grad: grad.data.view(-1)[:1].fill_(INF),
    "numpy": lambda grad: grad.numpy().reshape(-1).__setitem__(0, INF),
    "visible": lambda grad: grad.view(-1)[:1].fill_(INF),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("unscale", [True, False])
def test_infinities_written_by_hand_are_found(write: str, unscale: bool) -> None:
    """Also where no version counter tells of them, as in torch's own tests of its scaler."""

    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        scaler.scale(layer(X).sum()).backward()
        WRITES[write](layer.weight.grad)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    assert_same(in_both(run), 8)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_gradients_may_be_views_of_the_users_buffer(adopted: bool, strided: bool) -> None:
    """As in optimizers that keep all gradients in one tensor: they used to be replaced by fresh ones."""
    buffers = []

    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        if not adopted:
            layer.weight, layer.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
            optimizer.param_groups[0]["params"] = list(layer.parameters())
        flat = torch.zeros(6)
        buffers.append(flat)
        matrix = flat[:4].view(2, 2)
        layer.weight.grad, layer.bias.grad = matrix.t() if strided else matrix, flat[4:]
        for _ in range(2):
            flat.zero_()
            for _ in range(2):
                scaler.scale(layer(X).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert layer.weight.grad.data_ptr() == flat.data_ptr()

    assert_same(in_both(run), 16)
    assert_equal(buffers[1], buffers[0], "the buffer")
    assert buffers[0].norm() > 1


@pytest.mark.parametrize("then_backward", [True, False])
def test_gradients_of_autograd_grad_put_into_place_are_scaled(then_backward: bool) -> None:
    """Once a backward had met the weights, gradients put there by hand were taken for unscaled: 16 times too large."""

    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        for p, grad in zip(
            layer.parameters(), torch.autograd.grad(scaler.scale(layer(X).sum()), list(layer.parameters())), strict=True
        ):
            p.grad = grad
        if then_backward:
            scaler.scale(layer(X).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    assert_same(in_both(run), 16)


def test_a_scale_set_by_hand_is_the_one_that_is_taken_out() -> None:
    def run(_: type, layer: nn.Linear, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        scaler.scale(layer(X).sum())
        scaler._scale.fill_(64.0)
        scaler.scale(layer(X).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    assert_same(in_both(run), 64)


def test_a_sparse_gradient_and_a_fused_one_of_one_weight() -> None:
    results = []
    for scaler_class in BOTH:
        torch.manual_seed(0)
        table, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 5, bias=False)
        head.weight = table.weight
        if scaler_class is spu.GradScaler:
            spu.accelerate(head)
        optimizer, scaler = torch.optim.SGD(table.parameters(), lr=0.1), scaler_class("cpu", init_scale=8.0)
        for use in ("table", "both", "both", "table", "head"):
            h = torch.ones(2, 3) if use == "head" else table(torch.tensor([1, 4]))
            scaler.scale((h if use == "table" else head(h)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(table.weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tensor_hooks_see_scaled_gradients_and_post_hooks_the_true_one(
    when: str, kind: str, dtype: torch.dtype
) -> None:
    """On plain parameters it used to depend on which hook was registered first: 64 times larger, or not."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    seen: list[Tensor] = []
    done: list[Tensor] = []

    def register() -> None:
        weight.register_hook(lambda grad: seen.append(grad.float().clone()) or grad * 2)
        weight.register_post_accumulate_grad_hook(lambda p: done.append(p.grad.clone()))

    main_grads, scaler = MainGrads([weight]), LossScaler(64.0)
    if when == "before":
        register()
    for turn in range(2):
        main_grads.begin_step()
        if when == "after" and turn == 0:
            register()
        op = spu.ops.linear_act if kind == "fused" else F.linear
        scaler.scale(op(X.to(dtype), weight).float().sum()).backward()
    expected = X.sum(0).expand(2, 2)
    for grad in seen:
        assert_equal(grad, expected * 64, "tensor hook")
    for grad in done:
        assert_equal(grad, expected * 2, "post-accumulate hook")
    assert len(seen) == len(done) == 2
    assert torch.autograd.grad(scaler.scale(op(X.to(dtype), weight).float().sum()), weight)[0].float().sum() == 64 * 20
    assert_equal(weight.grad, expected * 2, "autograd.grad leaves it")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_threads_add_to_the_same_parameters(backend: str) -> None:
    net = nn.Sequential(spu.nn.Linear(4, 4), nn.LayerNorm(4), spu.nn.Linear(4, 1))
    x = torch.randn(64, 4)
    main_grads, scaler = MainGrads(net.parameters()), LossScaler(8.0)

    def run() -> None:
        for _ in range(25):
            with use_backend(backend):
                scaler.scale(net(x).square().mean(), threading.current_thread().name).backward()

    for turn in range(2):
        main_grads.begin_step()
        together(*[run] * 4)
        found = [p.grad.clone() for p in net.parameters()]
        main_grads.begin_step()
        (net(x).square().mean() * 100).backward()
        for (name, p), grad in zip(net.named_parameters(), found, strict=True):
            torch.testing.assert_close(
                grad, p.grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name, t=turn: f"{t} {n} {text}"
            )


def test_main_grads_beside_autograd_grad_and_chosen_inputs() -> None:
    net = nn.Sequential(spu.nn.Linear(2, 2, bias=False), nn.LayerNorm(2))
    main_grads, scaler = MainGrads(net.parameters()), LossScaler(8.0)
    for _ in range(2):
        main_grads.begin_step()
        weight, norm = net[0].weight, net[1].weight
        returned = torch.autograd.grad(scaler.scale(net(X).square().sum()), [weight, norm])
        assert weight.grad is norm.grad is None
        scaler.scale(net(X).square().sum()).backward(inputs=[norm])
        assert weight.grad is None
        assert_equal(norm.grad * 8, returned[1], "chosen")
        scaler.scale(net(X).square().sum()).backward()
        torch.testing.assert_close(weight.grad * 8, returned[0])
        assert_equal(norm.grad * 4, returned[1], "summed")


def test_two_scalers_of_two_models_take_turns() -> None:
    results = []
    for scaler_class in BOTH:
        layers = [layer_of(scaler_class) for _ in range(2)]
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
        scalers = [scaler_class("cpu", init_scale=scale) for scale in (4.0, 64.0)]
        for factors in ((1.0, INF), (INF, 1.0), (1.0, 1.0)):
            for layer, scaler, factor in zip(layers, scalers, factors, strict=True):
                scaler.scale(layer(X).square().sum() * factor).backward()
            for layer, scaler, optimizer in zip(layers, scalers, optimizers, strict=True):
                scaler.step(optimizer)
                scaler.update()
                layer.zero_grad(set_to_none=False)
        results.append(([s.get_scale() for s in scalers], [layer.weight.detach() for layer in layers]))
    assert results[0][0] == results[1][0] == [2, 32]
    torch.testing.assert_close(results[1][1], results[0][1])


def test_a_copied_model_begins_without_a_sink() -> None:
    layer, scaler = layer_of(spu.GradScaler), spu.GradScaler("cpu", init_scale=8.0)
    scaler.scale(layer(X).sum()).backward()
    twin, other = copy.deepcopy(layer), copy.deepcopy(scaler)
    assert sink_of(twin.weight) is None
    twin.zero_grad()
    other.scale(twin(X).sum()).backward()
    assert_equal(twin.weight.grad, layer.weight.grad, "the copy's")
    assert sink_of(twin.weight) is not sink_of(layer.weight)


def test_a_trainer_steps_where_a_hook_has_repaired_the_gradient() -> None:
    """As torch's scaler, which looks at the values; and it sees the main gradient, also where it is put off (zb)."""
    for schedule in ("1f1b", "zb"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.LayerNorm(2))
        seen: list[Tensor] = []

        def repair(p: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(p.grad.clone())
            p.grad.nan_to_num_(0.0, 0.0, 0.0)

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(repair)
        factor = [1.0]
        devices = spu.DeviceManager().get_devices("cpu,cpu")
        trainer = spu.ModelParallelTrainer(
            model, devices, precision="fp16", microbatches=2, schedule=schedule, lr=0.01,
            loss_fn=lambda out, target, factor=factor: (out.float() * factor[0] - target).square().mean(),
        )  # fmt: skip
        for factor[0] in (1.0, INF, 1.0):
            seen.clear()
            before = model[0].weight.detach().clone()
            result = trainer.step(X.repeat(2, 1), torch.zeros(4, 2))
            assert len(seen) == 2 * 6
            assert not result.skipped
            if factor[0] == 1.0:
                assert not torch.equal(model[0].weight, before)
                assert max(float(grad.abs().max()) for grad in seen) < 10
        assert trainer.scaler.get_scale() == 65536
        trainer.close()


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_weight_of_two_stages_is_refused(kind: str) -> None:
    """A mask of rows reached the embedding's part of the gradient alone: the masked rows were trained by the head."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    x, y = X.repeat(2, 1), torch.zeros(4, dtype=torch.long)
    trainer = spu.ModelParallelTrainer(
        model, spu.DeviceManager().get_devices("cpu,cpu"), precision="fp32", microbatches=2
    )
    trainer.step(x, y)
    handle = getattr(model[0].weight, kind)(lambda grad: None)
    with pytest.raises(ValueError, match=r"0.weight is used in stages 0 and 1 and has a hook"):
        trainer.step(x, y)
    handle.remove()
    assert not trainer.step(x, y).skipped
    trainer.close()


def test_a_hook_on_a_plain_16_bit_weight_that_has_its_sink_already() -> None:
    table = nn.Embedding(5, 3).bfloat16()
    optimizer, scaler = spu.optim.AdamW(table.parameters()), spu.GradScaler("cpu", init_scale=64.0)
    seen: list[float] = []
    for turn in range(3):
        if turn == 1:
            table.weight.register_hook(lambda grad: seen.append(float(grad.max())))
        optimizer.zero_grad()
        scaler.scale(table(torch.tensor([1, 2])).float().sum()).backward()
        scaler.unscale_(optimizer)
        assert table.weight.grad.max() == 1
        scaler.step(optimizer)
        scaler.update()
    assert seen == [64, 64]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trainer_clips_gradients_whose_squares_fp32_cannot_hold(precision: str) -> None:
    """The norm was inf: each of these steps was skipped, without a word but in the result."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    plain, x, y = copy.deepcopy(model), torch.randn(8, 2), torch.randint(3, (8,))
    before = model[0].weight.detach().clone()
    trainer = spu.ModelParallelTrainer(
        model, spu.DeviceManager().get_devices("cpu,cpu"), precision=precision, microbatches=2, lr=0.1,
        optimizer=torch.optim.SGD, max_grad_norm=1.0, loss_fn=lambda out, target: F.cross_entropy(out, target) * 1e25,
    )  # fmt: skip
    result = trainer.step(x, y)
    (F.cross_entropy(plain(x), y) * 1e25).backward()
    norm = torch.cat([p.grad.double().flatten() for p in plain.parameters()]).norm()
    rtol = 1e-5 if precision == "fp32" else 2e-2
    assert not result.skipped
    assert result.grad_norm == pytest.approx(norm.item(), rel=rtol)
    trainer.close()
    expected = before - 0.1 * (plain[0].weight.grad.double() / norm).float()
    torch.testing.assert_close(model[0].weight.float(), expected, rtol=rtol, atol=rtol * 0.1)
