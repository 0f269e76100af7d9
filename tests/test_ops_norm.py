"""rms_norm and layer_norm: values and gradients against fp64 on every backend, residuals, sinks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from op_checks import with_grads
from torch import Tensor, nn

from spu import ops
from spu.ops import backends, schema
from spu.precision import LossScaler, MainGrads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KINDS = ["rms", "rms rounded", "rms offset", "layer"]


def plain_rms(x: Tensor, weight: Tensor, rounded: bool = False, offset: float = 0.0, eps: float = 1e-5) -> Tensor:
    """As transformers writes it: Llama's form, and Gemma's."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype) if rounded else (wide * (offset + weight.to(wide.dtype))).to(x.dtype)


def functions(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The op and plain torch, of (x, weight, bias)."""
    if kind == "layer":
        return lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5)
    how: dict[str, Any] = {"rounded": kind == "rms rounded", "offset": float(kind == "rms offset")}
    return lambda x, w, b: ops.rms_norm(x, w, 1e-5, **how), lambda x, w, b: plain_rms(x, w, **how)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(shape) * 2 + 0.5
    return [x.to(dtype), (1 + torch.randn(shape[-1]) / 4).to(dtype), torch.randn(shape[-1]).to(dtype)]


def check_bound(backend: str, kind: str, given: list[Tensor], dy: Tensor) -> None:
    ours, plain = functions(kind)
    with ops.use_backend(backend):
        found = with_grads(ours, given, dy)
    torchs = with_grads(plain, given, dy)
    truth = with_grads(plain, [t.double() for t in given], dy.double())
    for name, a, b, t in zip(("y", "x", "weight", "bias"), found, torchs, truth):
        if t is None:
            assert a is None
            continue
        assert a is not None
        eps = (2 if a.dtype == torch.float32 else 0.5) * torch.finfo(a.dtype).eps * float(t.abs().max())
        assert_close_to_truth(a, b, t, eps=eps, name=name)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound_of_ragged_rows(backend: str, kind: str, dtype: torch.dtype) -> None:
    for shape in ((1, 7), (3, 5, 130), (37, 64)):
        given = tensors(shape, dtype)
        check_bound(backend, kind, given, torch.randn(shape).to(dtype))


@every_backend
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_strided_rows(backend: str, kind: str) -> None:
    given = tensors((24, 18), torch.float16)
    dy = torch.randn(24, 18).half()
    with ops.use_backend(backend):
        expected = with_grads(functions(kind)[0], given, dy)
        strided = [given[0].t().contiguous().t(), *(t.repeat_interleave(2)[::2] for t in given[1:])]
        found = with_grads(functions(kind)[0], strided, dy.t().contiguous().t())
    for a, b in zip(found, expected):
        if b is not None:
            assert_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_forward_is_bit_equal_to_plain_torch(kind: str) -> None:
    ours, plain = functions(kind)
    for dtype in DTYPES if kind != "layer" else DTYPES[2:]:
        given = tensors((6, 33), dtype)
        with ops.use_backend("reference"):
            assert_equal(ours(*given), plain(*given), f"{kind} {dtype}")


@pytest.mark.parametrize("kind", ["rms", "rms offset", "layer"])
def test_gradcheck(kind: str) -> None:
    given = [t.requires_grad_() for t in tensors((3, 5), torch.float64)]
    given = given if kind == "layer" else given[:2]
    ours = functions(kind)[0]
    assert torch.autograd.gradcheck(lambda *t: ours(*t, None) if len(t) == 2 else ours(*t), given)


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_rows_with_fp32_vectors_are_computed_in_fp64(kind: str) -> None:
    x, *vectors = tensors((4, 9), torch.float64)
    ours, dy = functions(kind)[0], torch.randn(4, 9, dtype=torch.float64)
    narrow = [vector.float() for vector in vectors]
    found = with_grads(ours, [x, *narrow], dy)
    expected = with_grads(ours, [x, *(vector.double() for vector in narrow)], dy)
    for a, b in zip(found, expected):
        if b is not None:
            assert_equal(a, b.to(a.dtype))
    with torch.no_grad():  # torch's own ops, which serve what the op leaves
        left = torch.vmap(lambda row: ours(row, *narrow))(x)
    torch.testing.assert_close(left, expected[0], rtol=1e-14, atol=1e-14)


@every_backend
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_residual_is_added_and_its_gradient_returns(backend: str, dtype: torch.dtype, layer: bool) -> None:
    x, weight, bias = tensors((9, 40), dtype)
    other, dy, dsum = (torch.randn(9, 40).to(dtype) for _ in range(3))

    def run(fused: bool, *given: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in given]
        x, other, weight, bias = leaves
        if not fused:
            total = x + other
            y = F.layer_norm(total, (40,), weight, bias) if layer else plain_rms(total, weight)
        elif layer:
            y, total = ops.layer_norm(x, weight, bias, residual=other)
        else:
            y, total = ops.rms_norm(x, weight, 1e-5, residual=other)
        torch.autograd.backward([y, total], [dy.to(y.dtype), dsum.to(y.dtype)])
        return [y.detach(), total.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    given = x, other, weight, bias
    with ops.use_backend(backend):
        found = run(True, *given)
    for a, b, t in zip(found, run(False, *given), run(False, *(t.double() for t in given)), strict=True):
        eps = (2 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps * float(t.abs().max())
        assert_close_to_truth(a, b, t, eps=eps)
    with ops.use_backend(backend):  # a loss that uses the sum alone
        leaf = x.clone().requires_grad_()
        ops.rms_norm(leaf, weight, residual=other)[1].backward(dsum)
    assert_equal(leaf.grad, dsum)


@every_backend
def test_leading_dimensions_and_empty_rows(backend: str) -> None:
    with ops.use_backend(backend):
        for shape in ((8,), (2, 3, 4, 8), (0, 8), (2, 0, 8)):
            given = [torch.randn(shape), torch.ones(8), torch.zeros(8)]
            for kind in ("rms", "layer"):
                y, dx, dw, _ = with_grads(functions(kind)[0], given, torch.ones(shape))
                assert y.shape == dx.shape == torch.Size(shape)
                assert dw.shape == (8,)
                torch.testing.assert_close(y, functions(kind)[1](*given))


@every_backend
def test_what_is_not_finite_stays_in_its_row(backend: str) -> None:
    x = torch.randn(4, 24).half()
    x[1, 3], x[2, 0] = float("inf"), float("nan")
    with ops.use_backend(backend):
        for y in (ops.rms_norm(x), ops.layer_norm(x)):
            assert y[[0, 3]].isfinite().all()
            assert y[1, 3].isnan()
            assert y[2].isnan().all()


@every_backend
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit parameters", "fp32 parameters"])
def test_sinks_take_the_parameters_gradients_found_inf_too(backend: str, wide: bool) -> None:
    rows = 96 if backend == "triton" else 3000  # interpreted, a row is a millisecond
    x = torch.randn(rows, 16).half()
    norm = nn.LayerNorm(16).to(torch.float32 if wide else torch.float16)
    scaler = LossScaler(init_scale=1024.0)
    with ops.use_backend(backend), MainGrads(norm.parameters()) as main:
        main.begin_step()
        for _ in range(2):
            y = ops.layer_norm(x, norm.weight, norm.bias)
            scaler.scale(y.float().sum() / 64).backward()
        assert norm.bias.grad.dtype == torch.float32
        assert_equal(norm.bias.grad, torch.full((16,), 2 * rows / 64))  # 16-bit sums stop at 2048 ones
        normed = F.layer_norm(x.double(), (16,))
        assert_close_to_truth(norm.weight.grad, norm.weight.grad, normed.sum(0) / 32, eps=1e-2)
        assert scaler.found_inf().item() == 0
        y = ops.layer_norm(x, norm.weight, norm.bias)
        scaler.scale((y.float() * torch.tensor(float("inf"))).sum()).backward()
        assert scaler.found_inf().item() == 1


def test_results_do_not_depend_on_threads() -> None:
    given, dy = tensors((700, 96), torch.bfloat16), torch.randn(700, 96).bfloat16()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(with_grads(functions("layer")[0], given, dy))
    if ops.choose_backend(given[0]) == "cpu":
        for a, b in zip(*found):
            assert_equal(a, b)


def test_frozen_tensors_get_no_gradient() -> None:
    x, weight, bias = tensors((5, 12), torch.float32)
    y = ops.layer_norm(x, weight.requires_grad_(), bias)
    y.sum().backward()
    assert bias.grad is None
    assert weight.grad is not None
    x.requires_grad_()
    ops.rms_norm(x, weight.detach()).sum().backward()
    assert x.grad is not None


def test_what_does_not_fit_is_refused_by_name() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight is \(7,\) on cpu, but x \(3, 8\) on cpu needs \(8,\)"):
        ops.rms_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match=r"weight is torch.float16 but x is torch.float32"):
        ops.rms_norm(x, torch.ones(8).half())
    with pytest.raises(ValueError, match="residual is torch.float32"):
        ops.layer_norm(x, residual=torch.randn(3, 7))
    with pytest.raises(TypeError, match="bias"):
        ops.layer_norm(x.half(), torch.ones(8), torch.zeros(8).half())
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        ops.rms_norm(torch.ones(3, 8, dtype=torch.int64))
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="rms_norm has no second derivative"):
        torch.autograd.grad(ops.rms_norm(leaf).sum(), leaf, create_graph=True)


def test_transforms_and_compile_are_torchs_own() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    total = torch.func.grad(lambda x: ops.rms_norm(x, weight).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    ops.rms_norm(leaf, weight).pow(2).sum().backward()
    torch.testing.assert_close(total, leaf.grad)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("cols", [1, 16, 45, 64, 200])
def test_rows_in_and_out_in_another_dtype(backend: str, dtype: torch.dtype, rounded: bool, cols: int) -> None:
    """A norm of fp32 rows that stores 16 bits, and its backward from 16 bits: the bits of a conversion apart."""
    if backend == "cpu" and not backends()["cpu"].available:
        pytest.skip("spu._C is not built")
    x, dsum, weight = torch.randn(3, 11, cols) * 50, torch.randn(3, 11, cols), torch.randn(cols)
    norm, norm_to = schema.overload("rms_norm", backend), schema.overload("rms_norm_to", backend)
    y, rstd, _ = norm(x, None, weight, 1e-5, 1.0, rounded)
    narrow, same = norm_to(x, weight, 1e-5, 1.0, rounded, dtype)
    assert_equal(narrow, y.to(dtype))
    assert_equal(same, rstd)
    for given in (torch.float32, dtype):  # what it does not do itself it converts
        there = x.to(given)
        expected = norm(there, None, weight, 1e-5, 0.0, rounded)[0]
        for wanted in (torch.float32, torch.float16, torch.bfloat16):
            assert_equal(norm_to(there, weight, 1e-5, 0.0, rounded, wanted)[0], expected.to(wanted))
    back = schema.overload("rms_norm_backward", backend)
    dy = torch.randn(x.shape).to(dtype)
    for more in (None, dsum):
        rest = more, x, weight, rstd, 1.0, rounded, True, True
        for found, expected in zip(back(dy, *rest), back(dy.float(), *rest), strict=True):
            assert_equal(found, expected)
    if cols == 45:  # of schema, fake and autograd, which know no sizes
        torch.library.opcheck(norm_to, (x, weight, 1e-5, 1.0, rounded, dtype))
