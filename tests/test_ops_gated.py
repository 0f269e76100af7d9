"""gated_mlp: values and gradients against truth on every backend, and what is refused; more in test_ops_mlp.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from backend_params import every_backend
from mlps import GATED, assert_only_needed, saved_shapes
from numeric import assert_close_to_truth, assert_equal
from op_checks import assert_registered, with_grads
from torch import Tensor, nn

from spu import ops
from spu.ops import schema
from spu.precision import LossScaler, MainGrads

NAMES, plain, operands = GATED.names, GATED.plain, GATED.operands


def fp32_limits(tensors: list[Tensor], dy: Tensor, activation: str) -> list[Tensor]:
    """What fp32 arithmetic may be off by in y and the four gradients, element by element, in any order of its sums.

    To first order, with u = 2**-24: a product of n terms adds n u |a| @ |b| and passes on the errors of its factors; an
    activation (|act'| <= 1.13, |act''| <= 0.8) passes on its argument's and adds 4 u (1 + |z|); a product of two
    numbers adds u of itself. Two correct kernels differ by this much where rounding is kind to one of them.
    """
    u = 2.0**-24
    x, w_gate, w_up, w_down = (t.detach().double() for t in tensors)
    dy = dy.double()

    def matmul(a: Tensor, da: Tensor | float, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b, (da + a.shape[1] * u * a.abs()) @ b.abs()

    def times(a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
        return a * b, da * b.abs() + a.abs() * db + u * (a * b).abs()

    gate, d_gate = matmul(x, torch.zeros_like(x), w_gate.t())
    up, d_up = matmul(x, torch.zeros_like(x), w_up.t())
    leaf = gate.clone().requires_grad_()
    act = ACTIVATIONS[activation](leaf)
    (slope,) = torch.autograd.grad(act.sum(), leaf)
    act, own = act.detach(), 4 * u * (1 + gate.abs())
    d_act, d_slope = 1.13 * d_gate + own, 0.8 * d_gate + own
    h, d_h = times(act, d_act, up, d_up)
    dh, d_dh = matmul(dy, torch.zeros_like(dy), w_down)
    d_gate_grad = times(*times(dh, d_dh, up, d_up), slope, d_slope)
    d_up_grad = times(dh, d_dh, act, d_act)
    left, right = matmul(*d_gate_grad, w_gate), matmul(*d_up_grad, w_up)
    dx = left[1] + right[1] + u * (left[0].abs() + right[0].abs())
    weights = [matmul(g.t(), d.t(), x)[1] for g, d in (d_gate_grad, d_up_grad)]
    return [matmul(h, d_h, w_down.t())[1], dx, *weights, matmul(h.t(), d_h.t(), dy)[1].t()]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 33])
def test_error_bound(backend: str, dtype: torch.dtype, activation: str, rows: int) -> None:
    tensors = operands(rows, 65, 130, 31, dtype=dtype)
    dy = torch.randn(rows, 31).to(dtype)
    with ops.use_backend(backend):
        ours = with_grads(ops.gated_mlp, tensors, dy, activation)
    torchs = with_grads(plain, tensors, dy, activation)
    truth = with_grads(plain, [t.double() for t in tensors], dy.double(), activation)
    # In 16 bits the roundings to storage, which both have, outweigh the order of a sum.
    limits = fp32_limits(tensors, dy, activation) if dtype == torch.float32 else [None] * 5
    for name, limit, *three in zip(("y", *NAMES), limits, ours, torchs, truth):
        assert_close_to_truth(*three, limit=limit, name=name)


def test_the_limits_of_fp32_hold_for_plain_torch_and_see_one_lost_term() -> None:
    tensors, dy = operands(5, 65, 130, 31), torch.randn(5, 31)
    torchs, truth = (with_grads(plain, [t.to(d) for t in tensors], dy.to(d)) for d in (torch.float32, torch.float64))
    for value, exact, limit in zip(torchs, truth, fp32_limits(tensors, dy, "silu")):
        assert ((value.double() - exact).abs() <= limit).all()
    short = [t.clone() for t in tensors]
    short[0][:, 64] = 0  # a kernel that forgets the last of 65 columns
    wrong = with_grads(plain, short, dy)
    for value, exact, limit in zip(wrong[:2], truth[:2], fp32_limits(tensors, dy, "silu")[:2]):
        assert ((value.double() - exact).abs() > limit).float().mean() > 0.9


@every_backend
def test_one_rounding_of_h(backend: str) -> None:
    """The composed op may round gate and up first, as plain torch does; h is never worse than that."""
    x, w_gate, w_up, _ = operands(40, 64, 96, dtype=torch.float16)
    h, gate, up = schema.overload("gated_linear", backend)(x, w_gate, w_up, "silu", True)
    truth = F.silu(x.double() @ w_gate.double().t()) * (x.double() @ w_up.double().t())
    assert_close_to_truth(h, F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), truth)
    for value, weight in ((gate, w_gate), (up, w_up)):
        assert_close_to_truth(value, F.linear(x, weight), x.double() @ weight.double().t())
    assert [t.numel() for t in schema.overload("gated_linear", backend)(x, w_gate, w_up, "silu", False)[1:]] == [0, 0]


@every_backend
def test_strides_do_not_matter(backend: str) -> None:
    tensors = operands(dtype=torch.bfloat16)
    strided = [t.t().contiguous().t() for t in tensors]
    dy = torch.randn(19, 17).bfloat16().t()
    with ops.use_backend(backend):
        for name, a, b in zip(
            ("y", *NAMES), with_grads(ops.gated_mlp, strided, dy), with_grads(ops.gated_mlp, tensors, dy.contiguous())
        ):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-2, atol=1e-3)


@every_backend
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_values_reach_all_that_they_should(backend: str, bad: float) -> None:
    tensors, dy = operands(), torch.randn(17, 19)
    tensors[0][3, 5] = bad
    with ops.use_backend(backend):
        y, dx, dgate, dup, ddown = with_grads(ops.gated_mlp, tensors, dy)
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[[0, 1, 2, 4]]).all()
    assert not torch.isfinite(dgate[:, 5]).any()
    assert not torch.isfinite(dup[:, 5]).any()
    assert not torch.isfinite(ddown).all()
    assert torch.isfinite(dx[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)])
def test_only_what_is_needed(needed: tuple[int, ...]) -> None:
    assert_only_needed(ops.gated_mlp, plain, operands(), torch.randn(17, 19), needed)


def test_saves_three_tensors_for_the_backward() -> None:
    assert saved_shapes(ops.gated_mlp, operands()) == [(17, 24), (17, 40), (17, 40)]


@every_backend
def test_opcheck(backend: str) -> None:
    x, w_gate, w_up, w_down = operands(5, 4, 6, 3)
    dh = torch.randn(5, 6)
    assert_registered(
        backend,
        ("gated_linear", x, w_gate, w_up, "silu", True),
        ("gated_dz", dh, torch.randn(5, 6), torch.randn(5, 6), "gelu"),
        ("gated_dx", dh, torch.randn(5, 6), w_gate, w_up),
        ("gated_mlp", *(t.clone().requires_grad_() for t in (x, w_gate, w_up, w_down)), "silu", True),
    )


def test_checkpointing_keeps_sinks() -> None:
    x, *values = operands(dtype=torch.float16)
    results = []
    for checkpointed in (False, True):
        weights = [nn.Parameter(v.clone()) for v in values]
        scaler = LossScaler(init_scale=1024.0)
        with MainGrads(weights) as grads:
            scaler.begin_step()
            grads.begin_step()
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(ops.gated_mlp, x, *weights, use_reentrant=False)
            else:
                y = ops.gated_mlp(x, *weights)
            scaler.scale(y.float().mean()).backward()
            results.append([w.grad.clone() for w in weights])
    for a, b in zip(*results):
        assert_equal(a, b)


def test_what_does_not_fit_is_named() -> None:
    x, w_gate, w_up, w_down = operands()
    with pytest.raises(ValueError, match="unknown activation 'tanh': use one of 'silu'"):
        ops.gated_mlp(x, w_gate, w_up, w_down, "tanh")
    with pytest.raises(ValueError, match=r"w_down \(40, 19\) do not fit"):
        ops.gated_mlp(x, w_gate, w_up, w_down.t())
    with pytest.raises(TypeError, match=r"x is torch.float32 but w_up is torch.float16"):
        ops.gated_mlp(x, w_gate, w_up.half(), w_down)
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        ops.gated_mlp(x.long(), w_gate, w_up, w_down)
    with pytest.raises(ValueError, match="needs keep=True"):
        torch.ops.spu.gated_mlp.reference(x, w_gate.requires_grad_(), w_up, w_down, "silu", False)
    (grad,) = torch.autograd.grad(ops.gated_mlp(x, w_gate, w_up, w_down).sum(), w_gate)
    assert grad.shape == w_gate.shape
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ops.gated_mlp(x, w_gate, w_up, w_down).sum(), w_gate, create_graph=True)
