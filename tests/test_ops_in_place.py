"""Weight gradients that the product's kernel adds to ``grad``: what a loop, a hook or a process group can see of it is
what autograd's own addition shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numeric import assert_equal
from ranks import in_ranks
from together import together
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import spu
from spu.ops import backends, gated_mlp, in_place, linear_act, mlp, use_backend

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
ROWS, WIDTH, INNER = 24, 16, 40
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def leaf(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


def x_of(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that a kernel has added to."""
    found: list[Tensor] = []
    add = in_place._InPlace.linear_weights

    def noting(self: Any, others: Any, *args: Any) -> None:
        found.extend(sink.grad for sink in (self, *others))
        add(self, others, *args)

    monkeypatch.setattr(in_place._InPlace, "linear_weights", noting)
    return found


def block(op: str, dtype: torch.dtype) -> tuple[list[nn.Parameter], Callable[[Tensor], Tensor], int]:
    """Parameters, a function of x, and how many weights it has."""
    wide, narrow, bias = leaf(INNER, WIDTH), leaf(WIDTH, INNER), leaf(INNER)
    if op == "linear":
        return [wide, bias], lambda x: linear_act(x, wide, bias, "gelu", dtype=dtype), 1
    if op == "transposed":
        return [narrow, bias], lambda x: linear_act(x, narrow, bias, dtype=dtype, transposed=True), 1
    if op == "mlp":
        return [wide, bias, narrow], lambda x: mlp(x, wide, bias, narrow, None, dtype=dtype), 2
    up = leaf(INNER, WIDTH)
    return [wide, up, narrow], lambda x: gated_mlp(x, wide, up, narrow, dtype=dtype), 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear", "transposed", "mlp", "gated"])
def test_the_sum_has_autograds_bits_in_the_same_tensor(op: str, dtype: torch.dtype, taken: list[Tensor]) -> None:
    params, run, weights = block(op, dtype)
    parts = [torch.autograd.grad(run(x_of(i)).float().square().sum(), params) for i in range(3)]
    assert not taken
    expected = [a + b + c for a, b, c in zip(*parts, strict=True)]
    run(x_of(0)).float().square().sum().backward()
    assert not taken  # there is nothing to add to
    grads = [param.grad for param in params]
    versions = [grad._version for grad in grads if grad is not None]
    for i in (1, 2):
        run(x_of(i)).float().square().sum().backward()
    assert len(taken) == 2 * weights
    for param, grad, version, value in zip(params, grads, versions, expected, strict=True):
        assert grad is not None
        assert param.grad is grad
        assert_equal(grad, value)
        assert grad._version == version + 2  # as after two additions


def test_a_decoder_layer_adds_in_place(taken: list[Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = spu.accelerate(transformers.AutoModelForCausalLM.from_config(config), precision="bf16")
    ids = torch.arange(16).view(1, 16)

    def backward() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not taken
    backward()
    assert len(taken) == 8  # q, k, v, o, gate, up, down and the head
    for name, p in model.named_parameters():
        assert_equal(p.grad, once[name] * 2, name)


def test_who_keeps_the_old_gradient_sees_the_sum(taken: list[Tensor]) -> None:
    weight = leaf(INNER, WIDTH)
    flat = torch.zeros(2 * weight.numel())
    weight.grad = flat[weight.numel() :].view_as(weight)
    (expected,) = torch.autograd.grad(linear_act(x_of(0), weight).sum(), weight)
    linear_act(x_of(0), weight).sum().backward()
    assert len(taken) == 1
    assert_equal(flat, torch.cat((torch.zeros(weight.numel()), expected.flatten())))
    other = weight * 1
    product = other * weight.grad  # keeps the gradient for its backward
    linear_act(x_of(0), weight).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def with_hook(attach: Callable[[nn.Parameter, list[Any]], Any]) -> Callable[[Callable[[], None], nn.Parameter], None]:
    def go(run: Callable[[], None], weight: nn.Parameter) -> None:
        seen: list[Any] = []
        handle = attach(weight, seen)
        run()
        assert len(seen) == 1
        assert seen[0] is not None
        handle.remove()

    return go


def node_hook(weight: nn.Parameter, seen: list[Any]) -> Any:
    node = get_gradient_edge(weight).node
    seen_by = node.register_prehook(lambda grads: seen.append(grads[0]))
    seen_by.node = node
    return seen_by


def strided(run: Callable[[], None], weight: nn.Parameter) -> None:
    weight.grad = torch.empty(weight.shape[::-1]).t().copy_(weight.grad)  # type: ignore[arg-type]
    run()


ORDINARY = {
    "tensor hook": with_hook(lambda weight, seen: weight.register_hook(seen.append)),
    "hook after": with_hook(
        lambda weight, seen: weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    ),
    "hook on the node": with_hook(node_hook),
    "several tensors' hook": with_hook(
        lambda weight, seen: torch.autograd.graph.register_multi_grad_hook([weight], seen.append)
    ),
    "other strides": strided,
}


@pytest.mark.parametrize("case", ORDINARY)
def test_what_can_see_the_gradient_gets_it(case: str, taken: list[Tensor]) -> None:
    weight = leaf(INNER, WIDTH)

    def run() -> None:
        linear_act(x_of(0), weight, dtype=torch.bfloat16).float().square().sum().backward()

    run()
    once = weight.grad.clone()  # type: ignore[union-attr]
    ORDINARY[case](run, weight)
    assert not taken
    assert_equal(weight.grad, once * 2)  # type: ignore[arg-type]
    if case != "other strides":
        run()
        assert len(taken) == 1  # the hook is gone


def test_who_holds_a_node_is_seen() -> None:
    """The count of references to a node's object is CPython's: this says if another one changes it."""
    found: list[bool] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            found.append(in_place._is_held(ctx, 0))
            return dy

    x = torch.ones(2, requires_grad=True)
    Asks.apply(x).sum().backward()
    held = get_gradient_edge(x)
    Asks.apply(x).sum().backward()
    del held
    Asks.apply(x).sum().backward()
    assert found == [False, True, False]


def test_the_anomaly_mode_finds_a_nan(taken: list[Tensor]) -> None:
    weight = leaf(INNER, WIDTH)
    weight.grad = torch.zeros_like(weight)
    x = x_of(0)
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
        linear_act(x, weight).backward(torch.full((ROWS, INNER), torch.nan))
    assert not taken


def test_gradients_asked_for_are_returned_and_second_derivatives_refused(taken: list[Tensor]) -> None:
    weight, other = leaf(INNER, WIDTH), leaf(WIDTH, INNER)
    for param in (weight, other):
        param.grad = torch.ones_like(param)
    y = linear_act(linear_act(x_of(0), weight), other).square().sum()
    (found,) = torch.autograd.grad(y, other, retain_graph=True)
    y.backward(inputs=[other], retain_graph=True)
    assert_equal(weight.grad, torch.ones_like(weight))
    assert_equal(other.grad, found + 1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        y.backward(create_graph=True)
    assert_equal(other.grad, found + 1)
    y.backward()
    assert_equal(other.grad, found + 1 + found)


def test_several_uses_of_a_weight(taken: list[Tensor]) -> None:
    """Fused twice and by torch's own op once: integers, so that every order of the additions has the same sum."""
    weight = nn.Parameter(torch.randint(-3, 4, (WIDTH, WIDTH)).float())
    weight.grad = torch.ones_like(weight)
    x = torch.randint(-3, 4, (ROWS, WIDTH)).float()
    expected = 1 + 3 * x.sum(0).expand_as(weight)
    (linear_act(x, weight) + linear_act(x, weight) + x @ weight.t()).sum().backward()
    assert len(taken) == 2
    assert_equal(weight.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, taken: list[Tensor]) -> None:
    params, run, _ = block("gated", torch.bfloat16)
    found = []
    for recompute in (False, True):
        for param in params:
            param.grad = torch.ones_like(param)
        x = x_of(0).requires_grad_()
        y = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        y.float().square().sum().backward()
        found.append([param.grad for param in params])
    assert len(taken) == 6
    for a, b in zip(*found, strict=True):
        assert_equal(a, b)  # type: ignore[arg-type]


def test_a_backward_that_fails_has_added_what_torchs_has() -> None:
    """The weights that it came by, once."""

    def fail(_: Tensor) -> None:
        raise RuntimeError("here")

    late, early = leaf(WIDTH, WIDTH), leaf(WIDTH, WIDTH)
    results = []
    for op in (linear_act, torch.nn.functional.linear):
        for param in (late, early):
            param.grad = torch.zeros_like(param)
        middle = op(x_of(0), early)
        middle.register_hook(fail)
        with pytest.raises(RuntimeError, match="here"):
            op(middle, late).sum().backward()
        results.append((late.grad, early.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not early.grad.any()  # type: ignore[union-attr]


def test_threads_lose_no_addition() -> None:
    weight, x = nn.Parameter(torch.zeros(WIDTH, WIDTH)), torch.ones(ROWS, WIDTH)
    weight.grad = torch.zeros_like(weight)

    def run() -> None:
        for _ in range(50):
            linear_act(x, weight).sum().backward()

    together(*[run] * 4)
    assert_equal(weight.grad, torch.full((WIDTH, WIDTH), 200.0 * ROWS))


def test_a_backward_beside_a_scope_and_the_reference_backend(taken: list[Tensor]) -> None:
    """A parameter with a sink keeps its hook's way, and the reference adds up as autograd does."""
    weight = leaf(INNER, WIDTH)
    weight.grad = torch.zeros_like(weight)
    with use_backend("reference"):
        linear_act(x_of(0), weight).sum().backward()
    weight.grad = None
    scaler = spu.GradScaler("cpu", init_scale=8.0)
    scaler.scale(linear_act(x_of(0), weight).sum()).backward()
    linear_act(x_of(0), weight).sum().backward()
    assert not taken
    # As with torch's GradScaler a gradient that was not scaled is divided like the others.
    torch.testing.assert_close(weight.grad, (1 + 1 / 8) * x_of(0).sum(0).expand_as(weight))


def parallel_run(bucket_view: bool) -> list[Any]:
    """Two steps of two microbatches under DistributedDataParallel, the first without communication."""
    grads = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
        if fused:
            spu.accelerate(model)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        for step in range(2):
            parallel.zero_grad(set_to_none=step == 0)
            with parallel.no_sync():
                parallel(x_of(dist.get_rank())).square().mean().backward()
            parallel(x_of(2 + dist.get_rank())).square().mean().backward()
            grads += [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
    return grads


@pytest.mark.parametrize("bucket_view", [False, True])
def test_data_parallel(bucket_view: bool) -> None:
    ranks = in_ranks(2, parallel_run, bucket_view)
    for grads in ranks:
        assert len(grads) == 16
        for ours, torchs in zip(grads[:8], grads[8:], strict=True):
            np.testing.assert_allclose(ours, torchs, rtol=1e-5, atol=1e-6)
    for a, b in zip(*ranks, strict=True):
        np.testing.assert_array_equal(a, b)
