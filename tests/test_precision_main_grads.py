"""The gradient contract: fp32, true scale, summed, checked; for fused and plain parameters alike."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spu import ops
from spu.nn import Linear, accelerate
from spu.precision import LossScaler, MainGrads


class Net(nn.Module):
    """Fused linears, a norm, an embedding, and a table that is used by a fused and by a plain op."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = Linear(8, 24, activation="gelu")
        self.down = Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.unused = Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return ops.linear_act(self.norm(x + self.down(self.up(x))), self.embed.weight)  # a tied head


def plain_twin(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same values, but every op plain torch's."""
    twin = copy.deepcopy(net).to(dtype)

    def forward(tokens: Tensor) -> Tensor:
        x = twin.embed(tokens)
        h = F.linear(F.gelu(F.linear(x, twin.up.weight, twin.up.bias)), twin.down.weight)
        return F.linear(twin.norm(x + h), twin.embed.weight)

    twin.forward = forward
    return twin


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    logits = net(tokens)
    return F.cross_entropy(
        (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, -2), tokens.flatten()
    )


def step(
    net: nn.Module, main_grads: MainGrads, scaler: LossScaler, batches: list[Tensor], use_checkpoint=False
) -> None:
    main_grads.begin_step()
    scaler.begin_step()
    for tokens in batches:
        if use_checkpoint:
            logits = checkpoint(net, tokens, use_reentrant=False)
            loss = F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten())
        else:
            loss = loss_of(net, tokens)
        scaler.scale(loss).backward()


def batches_of(count: int) -> list[Tensor]:
    return [torch.randint(11, (3, 5)) for _ in range(count)]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_after_backward_every_gradient_is_the_true_one_in_fp32(
    backend: str, dtype: torch.dtype, use_checkpoint: bool
) -> None:
    net = Net().to(dtype)
    batches = batches_of(3)
    plain, truth = plain_twin(net, dtype), plain_twin(net, torch.float64)
    scaler, main_grads = LossScaler(1024.0), MainGrads(net.parameters())
    with ops.use_backend(backend):
        for _ in range(2):  # the second step reuses the buffers of the first
            step(net, main_grads, scaler, batches, use_checkpoint)
    for tokens in batches:
        (loss_of(plain, tokens) * 1024).backward()
        loss_of(truth, tokens).backward()
    assert scaler.found_inf().item() == 0
    for (name, ours), theirs, exact in zip(net.named_parameters(), plain.parameters(), truth.parameters()):
        if name.startswith("unused"):
            assert ours.grad is None
            continue
        assert ours.grad.dtype == torch.float32, name
        # A gradient sums 45 terms of up to 1/15, each rounded once or more on its way through four layers.
        eps = torch.finfo(dtype).eps * (2.0 if dtype == torch.float32 else 0.2)
        assert_close_to_truth(ours.grad, theirs.grad.float() / 1024, exact.grad, eps=eps, name=name)


@every_backend
def test_fused_fp16_gradients_are_never_rounded_to_fp16(backend: str) -> None:
    """Many microbatches whose sum an fp16 gradient could not hold: 1024 + 0.25, ninety-nine times."""
    layer = Linear(1, 1, bias=False).half()
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler(1.0)
    main_grads.begin_step()
    with ops.use_backend(backend):
        for value in [1024.0] + [0.25] * 99:
            scaler.scale(layer(torch.full((1, 1), value).half()).sum()).backward()
    assert layer.weight.grad.item() == 1024 + 0.25 * 99


def test_in_fp32_at_scale_one_the_bits_are_plain_torchs() -> None:
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(9, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    twin = copy.deepcopy(net)
    accelerate(net)
    scaler, main_grads = LossScaler(1.0), MainGrads(net.parameters())
    with ops.use_backend("reference"):
        for _ in range(2):
            main_grads.begin_step()
            scaler.begin_step()
            twin.zero_grad()
            for _ in range(3):
                x = torch.randn(5, 9)
                scaler.scale(net(x).square().mean()).backward()
                twin(x).square().mean().backward()
            for (name, ours), theirs in zip(net.named_parameters(), twin.parameters()):
                assert_equal(ours.grad, theirs.grad, name)


@every_backend
@pytest.mark.parametrize("order", ["fused first", "plain first", "both at once", "fused twice"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_parameter_with_several_uses(backend: str, order: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(6, 6).to(dtype))
    x = torch.randn(4, 6).to(dtype)
    uses = {
        "fused first": [[ops.linear_act], [F.linear]],
        "plain first": [[F.linear], [ops.linear_act]],
        "both at once": [[ops.linear_act, F.linear]],
        "fused twice": [[ops.linear_act, ops.linear_act]],
    }[order]
    scaler, main_grads = LossScaler(64.0), MainGrads([weight, weight])
    with ops.use_backend(backend):
        for _ in range(2):
            main_grads.begin_step()
            for functions in uses:
                scaler.scale(sum(function(x, weight).float().sum() for function in functions)).backward()
    exact = 2 * torch.ones(4, 6).t() @ x.float()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, exact, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=2e-3)


@every_backend
def test_overflow_anywhere_is_found(backend: str) -> None:
    for name in ("up.weight", "up.bias", "down.weight", "norm.weight", "norm.bias", "embed.weight"):
        net = Net().half()
        main_grads, scaler = MainGrads(net.parameters()), LossScaler(1.0)
        main_grads.begin_step()
        with ops.use_backend(backend):
            y = net(torch.tensor([1, 2]))
        parameter = dict(net.named_parameters())[name]
        (contribution,) = torch.autograd.grad(y.float().sum(), parameter, retain_graph=True)
        assert torch.isfinite(contribution).all()
        scaler.begin_step()
        scaler.scale((parameter.float() * 3e38).sum() + y.float().sum()).backward()
        expected = float(not torch.isfinite((torch.ones_like(parameter).float() * 3e38).to(parameter.dtype)).all())
        assert scaler.found_inf().item() == expected == 1.0, name


@every_backend
def test_an_overflow_of_dz_alone_is_found(backend: str) -> None:
    """dy = 65504 * 60 does not exist in fp16: the product over tokens sees the infinity."""
    layer = Linear(4, 4).half()
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler(2.0**16)
    main_grads.begin_step()
    with ops.use_backend(backend):
        scaler.scale((layer(torch.ones(2, 4).half()).float() * 60).sum()).backward()
    assert scaler.found_inf().item() == 1


def test_parameters_without_a_contribution_keep_none_and_stale_values_do_not_return() -> None:
    layer = Linear(3, 2)
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler(1.0)
    main_grads.begin_step()
    scaler.scale(layer(torch.full((1, 3), float("inf"))).sum()).backward()
    assert not torch.isfinite(layer.weight.grad).any()
    main_grads.begin_step()
    assert layer.weight.grad is None
    scaler.scale(layer(torch.ones(1, 3)).sum()).backward()
    assert_equal(layer.weight.grad, torch.ones(2, 3), "a store, not a multiplication by zero")


def test_buffers_are_reused_from_step_to_step() -> None:
    net = Net().half()
    main_grads, scaler = MainGrads(net.parameters()), LossScaler()
    pointers = []
    for _ in range(3):
        step(net, main_grads, scaler, batches_of(2))
        pointers.append([None if p.grad is None else p.grad.data_ptr() for p in net.parameters()])
    assert pointers[0] == pointers[1] == pointers[2]


def test_without_hooks_gradients_are_autograds_and_memory_is_kept_for_ops_alone() -> None:
    x = torch.randn(3, 4)
    fused, plain, half = (nn.Parameter(torch.randn(4, 4).to(d)) for d in (torch.float32, torch.float32, torch.float16))
    wanted = [p.detach().clone().requires_grad_() for p in (fused, plain)]
    F.linear(x, wanted[0]).matmul(wanted[1]).sum().backward()
    scaler = LossScaler(enabled=False)
    with MainGrads([fused, plain, half], hooked=False) as grads:
        places: list[int] = []
        for _ in range(3):
            grads.begin_step()
            loss = (ops.linear_act(x, fused) @ plain).sum() + (half * half).float().sum()
            scaler.scale(loss).backward()
            assert half.grad is not None
            assert half.grad.dtype == torch.float32  # it has a hook
            places.append(fused.grad.data_ptr())  # type: ignore[union-attr]
            assert_equal(plain.grad, wanted[1].grad)
            torch.testing.assert_close(fused.grad, wanted[0].grad)
            made = weakref.ref(plain.grad)
            grads.begin_step()
            assert made() is None  # nothing would use its memory
        assert len(set(places)) == 1


def test_outside_a_scope_gradients_are_plain() -> None:
    layer = Linear(3, 2).half()
    main_grads = MainGrads(layer.parameters())
    main_grads.begin_step()
    layer(torch.ones(1, 3).half()).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert_equal(layer.weight.grad, torch.ones(2, 3), "dw")


def test_the_contract_survives_what_loses_grad_dtype() -> None:
    layer = Linear(3, 2).half()
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler()
    main_grads.begin_step()
    for parameter in layer.parameters():
        parameter.grad_dtype = torch.float16
    main_grads.begin_step()
    scaler.scale(layer(torch.ones(1, 3).half()).float().sum()).backward()
    assert layer.weight.grad.dtype == torch.float32


def test_a_foreign_gradient_layout_is_taken_over() -> None:
    layer = Linear(3, 2, bias=False)
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler(4.0)
    main_grads.begin_step()
    layer.weight.grad = torch.ones(3, 2).t()
    scaler.scale(layer(torch.ones(1, 3)).sum()).backward()
    assert_equal(layer.weight.grad, torch.full((2, 3), 2.0), "dw")


def test_close_gives_the_parameters_back() -> None:
    layer = Linear(3, 2)
    with MainGrads(layer.parameters()) as main_grads:
        main_grads.begin_step()
        assert ops.sink_of(layer.weight) is not None
    assert ops.sink_of(layer.weight) is None
    LossScaler(8.0).scale(layer(torch.ones(1, 3)).sum()).backward()
    assert_equal(layer.weight.grad, torch.full((2, 3), 8.0), "still scaled: nothing unscales it any more")
    main_grads.close()


def test_neither_parameters_nor_hooks_leak() -> None:
    layer = Linear(3, 2)
    main_grads = MainGrads(layer.parameters())
    main_grads.begin_step()
    LossScaler().scale(layer(torch.ones(1, 3)).sum()).backward()
    gone = weakref.ref(layer.weight)
    del layer, main_grads
    gc.collect()
    assert gone() is None


def test_begin_step_twice_installs_hooks_once() -> None:
    norm = nn.LayerNorm(3)
    main_grads, scaler = MainGrads(norm.parameters()), LossScaler(4.0)
    main_grads.begin_step()
    main_grads.begin_step()
    scaler.scale(norm(torch.randn(2, 3)).sum()).backward()
    assert_equal(norm.bias.grad, torch.full((3,), 2.0), "db")


def test_unsuitable_parameters_are_named() -> None:
    with pytest.raises(TypeError, match=r"shape \(2,\) is torch.float64.*float16, bfloat16 and float32"):
        MainGrads([nn.Parameter(torch.zeros(2).double())])
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert MainGrads([frozen]).params == []
    embedding = nn.Embedding(4, 3, sparse=True)
    main_grads = MainGrads(embedding.parameters())
    main_grads.begin_step()
    with pytest.raises(TypeError, match=r"sparse=False"):
        LossScaler().scale(embedding(torch.tensor([1])).sum()).backward()


def test_post_accumulate_hooks_of_the_user_still_fire() -> None:
    layer, fired = Linear(3, 2), []
    layer.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad is not None))
    main_grads, scaler = MainGrads(layer.parameters()), LossScaler()
    main_grads.begin_step()
    scaler.scale(layer(torch.ones(1, 3)).sum()).backward()
    assert fired == [True]


def gated_gradients(
    prepare: Callable[[nn.Parameter, nn.Parameter], None], weights: Sequence[nn.Parameter] = ()
) -> list[Tensor]:
    """The main gradients of a gated MLP's weights after two backwards; ``prepare(gate, up)`` comes first."""
    torch.manual_seed(0)
    shapes = (40, 24), (40, 24), (16, 40)
    gate, up, down = weights or [nn.Parameter(torch.randn(*shape).half() / 4) for shape in shapes]
    params = list(dict.fromkeys((gate, up, down)))
    main_grads, scaler = MainGrads(params), LossScaler(64.0)
    main_grads.begin_step()
    prepare(gate, up)
    for _ in range(2):
        y = ops.gated_mlp(torch.randn(33, 24).half(), gate, up, down)
        scaler.scale(y.float().square().mean()).backward()
    return [p.grad.clone() for p in params]


@every_backend
def test_weights_of_one_x_get_their_gradients_together_or_one_by_one(backend: str) -> None:
    """A hook that is to see a gradient at once, and gradients of which some are there: the same bits."""
    fired: list[Tensor] = []

    def hook(gate: Tensor, up: Tensor) -> None:
        up.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))

    def there(gate: Tensor, up: Tensor) -> None:
        up.grad = torch.zeros(40, 24)

    with ops.use_backend(backend):
        expected = gated_gradients(lambda gate, up: None)
        for prepare in (hook, there):
            for ours, other in zip(gated_gradients(prepare), expected, strict=True):
                assert_equal(ours, other)
    assert len(fired) == 2
    assert_equal(fired[-1], expected[1])


def test_one_weight_in_both_places() -> None:
    torch.manual_seed(1)
    weight, down = nn.Parameter(torch.randn(40, 24).half() / 4), nn.Parameter(torch.randn(16, 40).half())
    tied = gated_gradients(lambda *_: None, (weight, weight, down))
    twins = nn.Parameter(weight.detach().clone()), nn.Parameter(weight.detach().clone())
    gate, up, _ = gated_gradients(lambda *_: None, (*twins, nn.Parameter(down.detach().clone())))
    # The order of the additions differs: what is rounded are sums of 33 products, as large as the largest gradients.
    rounding = 2.0**-22 * (gate.abs().max() + up.abs().max()).item()
    torch.testing.assert_close(tied[0], gate + up, rtol=0, atol=rounding)


def test_backwards_in_two_threads_that_share_weights_in_other_places_end() -> None:
    first, second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    down, x = torch.eye(8), torch.randn(4, 8)
    main_grads, scaler = MainGrads([first, second]), LossScaler(1.0)
    main_grads.begin_step()

    def run(*weights: Tensor) -> None:
        for _ in range(200):
            scaler.scale(ops.gated_mlp(x, *weights, down).sum()).backward()

    threads = [threading.Thread(target=run, args=order, daemon=True) for order in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    once = [p.grad.clone() for p in (first, second)]
    main_grads.begin_step()
    run(first, second)
    run(second, first)
    for grad, p in zip(once, (first, second), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_recurrent_weights_add_their_steps_in_fp32(kind: type[nn.RNNBase]) -> None:
    """torch's own sum over the steps is off by half and more (findings/gru_16bit_gradients.sh)."""
    torch.manual_seed(0)
    net = kind(4, 4, batch_first=True).bfloat16()
    truth, x = copy.deepcopy(net).double(), torch.rand(1, 1500, 4).bfloat16()
    MainGrads(net.parameters()).begin_step()
    net(x)[0].sum().backward()
    truth(x.double())[0].sum().backward()
    for p, q in zip(net.parameters(), truth.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 0.02 * q.grad.norm()
