"""What is asked of both MLPs as one op, with a gate and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from op_checks import Op, with_grads
from torch import Tensor, nn

from spu import ops
from spu.precision import LossScaler, MainGrads


def plain_mlp(x: Tensor, w_in: Tensor, b_in: Any, w_out: Tensor, b_out: Any, activation: str = "gelu") -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_in, b_in)), w_out, b_out)


def mlp_operands(rows: int = 17, k: int = 24, n: int = 40, out: int = 19, **options: Any) -> list[Tensor]:
    shapes = ((rows, k), (n, k), (n,), (out, n), (out,))
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(**options) for shape in shapes]


def plain_gated(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str = "silu") -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def gated_operands(rows: int = 17, k: int = 24, n: int = 40, out: int = 19, **options: Any) -> list[Tensor]:
    shapes = ((rows, k), (n, k), (n, k), (out, n))
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(**options) for shape in shapes]


@dataclass(frozen=True)
class Form:
    """One of the two: the op, the same in plain torch, its operands and their names, and its activations."""

    op: Op
    plain: Op
    operands: Callable[..., list[Tensor]]
    names: tuple[str, ...]
    activations: Sequence[str]


MLP = Form(ops.mlp, plain_mlp, mlp_operands, ("x", "w_in", "b_in", "w_out", "b_out"), ops.MLP_ACTIVATIONS)
GATED = Form(ops.gated_mlp, plain_gated, gated_operands, ("x", "w_gate", "w_up", "w_down"), ops.GATED_ACTIVATIONS)


def assert_only_needed(op: Op, plain: Op, tensors: list[Tensor], dy: Tensor, needed: Sequence[int], *args: Any) -> None:
    """Gradients are those of the plain form for the tensors that need one, and none for the others."""
    expected = with_grads(plain, tensors, dy, *args)[1:]
    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    op(*leaves, *args).backward(dy)
    for i, leaf in enumerate(leaves):
        if i in needed:
            torch.testing.assert_close(leaf.grad, expected[i], rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


def saved_shapes(op: Op, tensors: list[Tensor], *args: Any) -> list[tuple[int, ...]]:
    """The shapes of what the backward keeps beside the weights, sorted."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = [nn.Parameter(w) for w in tensors[1:]]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        op(tensors[0].requires_grad_(), *weights, *args)
    own = {w.untyped_storage().data_ptr() for w in weights}
    return sorted(tuple(t.shape) for p, t in saved.items() if p not in own)


def assert_sinks(op: Op, plain: Op, tensors: list[Tensor], names: Sequence[str], backend: str, large: float) -> None:
    """Two steps of two microbatches into one buffer, unscaled; an x that is ``large`` overflows fp16 and no fp32."""
    x, *values = tensors
    half = x.dtype == torch.float16
    weights = [nn.Parameter(v) for v in values]
    truth = [v.double().requires_grad_() for v in values]
    scaler = LossScaler(init_scale=2.0**13)
    with MainGrads(weights) as grads, ops.use_backend(backend):
        for _ in range(2):
            scaler.begin_step()
            grads.begin_step()
            for scale in (1.0, 0.5):
                loss = op(x, *weights).float().mean() * scale
                scaler.scale(loss).backward()
            assert scaler.found_inf().item() == 0
        plain(x.double(), *truth).mean().mul(1.5).backward()
        for name, weight, true in zip(names, weights, truth, strict=True):
            assert weight.grad is not None
            assert true.grad is not None
            assert weight.grad.dtype == torch.float32
            error = (weight.grad.double() - true.grad).abs().max() / true.grad.abs().max()
            assert error < (5e-3 if half else 1e-5), (name, float(error))
        scaler.begin_step()
        grads.begin_step()
        scaler.scale(op(x * large, *weights).float().sum()).backward()
        assert scaler.found_inf().item() == int(half)
