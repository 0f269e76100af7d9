"""mlp: values and gradients against truth on every backend, what is kept, what is refused; and gated_mlp beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from mlps import GATED, MLP, Form, assert_only_needed, assert_sinks, saved_shapes
from numeric import assert_close_to_truth, assert_equal
from op_checks import assert_registered, with_grads

from spu import ops
from spu.ops import schema

NAMES, plain, operands = MLP.names, MLP.plain, MLP.operands
both = pytest.mark.parametrize("form", [MLP, GATED], ids=["mlp", "gated"])


@both
def test_fp32_reference_is_bit_equal_to_plain_torch(form: Form) -> None:
    tensors, dy = form.operands(), torch.randn(17, 19)
    for activation in form.activations:
        with ops.use_backend("reference"):
            ours = with_grads(form.op, tensors, dy, activation)
        for name, a, b in zip(("y", *form.names), ours, with_grads(form.plain, tensors, dy, activation)):
            assert_equal(a, b, f"{name} ({activation})")


@both
def test_gradcheck(form: Form) -> None:
    tensors = [t.requires_grad_() for t in form.operands(3, 4, 5, 2, dtype=torch.float64)]
    for activation in form.activations:
        assert torch.autograd.gradcheck(lambda *t, name=activation: form.op(*t, name), tensors)


@both
@every_backend
@pytest.mark.parametrize("shape", [(4, 5, 24), (24,), (0, 24), (2, 0, 24)])
def test_any_leading_dimensions(backend: str, shape: tuple[int, ...], form: Form) -> None:
    _, *weights = form.operands()
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 19)
    with ops.use_backend(backend):
        ours = with_grads(form.op, [x, *weights], dy)
    for name, a, b in zip(("y", *form.names), ours, with_grads(form.plain, [x, *weights], dy)):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("form", "large"), [(MLP, 1e6), (GATED, 30000)], ids=["mlp", "gated"])
def test_sinks_take_unscaled_fp32_gradients(backend: str, dtype: torch.dtype, form: Form, large: float) -> None:
    assert_sinks(form.op, form.plain, form.operands(64, 32, 48, 32, dtype=dtype), form.names[1:], backend, large)


@both
@pytest.mark.leaks_threads  # the compiler's
def test_compiles_whole(form: Form) -> None:
    tensors, dy = form.operands(), torch.randn(17, 19)
    compiled = torch.compile(form.op, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_grads(compiled, tensors, dy), with_grads(form.op, tensors, dy)):
        assert_equal(a, b)


@both
def test_autocast_converts_first(form: Form) -> None:
    leaves = [t.requires_grad_() for t in form.operands()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = form.op(*leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    assert_equal(y.detach(), form.op(*(t.detach().bfloat16() for t in leaves)), "y")


def test_a_dtype_converts_first() -> None:
    given = operands()
    assert_equal(ops.mlp(*given, dtype=torch.bfloat16), ops.mlp(*(t.bfloat16() for t in given)), "y in a dtype")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ops.MLP_ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 130])
def test_error_bound(backend: str, dtype: torch.dtype, activation: str, rows: int) -> None:
    """In fp32 sums of n terms differ by their order: both may be off by n 2^-24 of the sum of their sizes."""
    tensors = operands(rows, 65, 300, 31, dtype=dtype)
    dy = torch.randn(rows, 31).to(dtype)
    with ops.use_backend(backend):
        ours = with_grads(ops.mlp, tensors, dy, activation)
    torchs = with_grads(plain, tensors, dy, activation)
    truth = with_grads(plain, [t.double() for t in tensors], dy.double(), activation)
    for name, value, theirs, true in zip(("y", *NAMES), ours, torchs, truth):
        eps = max(300, rows) * 2.0**-24 * float(true.abs().max()) if dtype == torch.float32 else None
        assert_close_to_truth(value, theirs, true, eps=eps, name=name)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_sum_over_rows_is_of_the_rounded_gradient(backend: str, dtype: torch.dtype) -> None:
    """Of several blocks of rows and columns, ragged at both ends; the same whether it is asked for or not."""
    dy, w_out, saved = torch.randn(300, 24).to(dtype), torch.randn(24, 600).to(dtype), torch.randn(300, 600).to(dtype)
    op = schema.overload("mlp_dz", backend)
    dz, h, sums = op(dy, w_out, saved, "gelu", True, True)
    assert sums.dtype == torch.float32
    true = dz.double().sum(0)
    limit = 300 * 2.0**-24 * dz.double().abs().sum(0)
    assert ((sums.double() - true).abs() <= limit).all()
    expected = F.gelu(saved.double())
    assert_close_to_truth(h, F.gelu(saved.float()).to(dtype), expected, name="h")
    alone, *nothing = op(dy, w_out, saved, "gelu", False, False)
    assert_equal(alone, dz, "dz")
    assert [t.numel() for t in nothing] == [0, 0]
    assert_equal(op(dy, w_out, saved, "relu", True, False)[1], F.relu(saved), "relu's h")


def test_the_sums_do_not_depend_on_the_number_of_threads() -> None:
    dy, w_out, saved = torch.randn(300, 24).half(), torch.randn(24, 96).half(), torch.randn(300, 96).half()
    made = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        made.append(ops.schema.overload("mlp_dz", ops.choose_backend(dy))(dy, w_out, saved, "silu", True, True))
    for other in made[1:]:
        for name, a, b in zip(("dz", "h", "sums"), other, made[0]):
            assert_equal(a, b, name)


@every_backend
def test_strides_and_transposed_weights(backend: str) -> None:
    tensors, dy = operands(), torch.randn(19, 17).t()
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    turned = [t.t().contiguous() if name.startswith("w") else t for name, t in zip(NAMES, tensors)]
    expected = with_grads(plain, tensors, dy.contiguous())
    with ops.use_backend(backend):
        found = with_grads(ops.mlp, strided, dy)
        other = with_grads(lambda *t: ops.mlp(*t, transposed=True), turned, dy)
    for i, name in enumerate(("y", *NAMES)):
        back = other[i].t() if name.startswith("w") else other[i]
        for value in (found[i], back):
            torch.testing.assert_close(value, expected[i], msg=lambda t, n=name: f"{n}: {t}", rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_values_reach_all_that_they_should(backend: str, bad: float) -> None:
    tensors, dy = operands(), torch.randn(17, 19)
    tensors[0][3, 5] = bad
    with ops.use_backend(backend):
        y, dx, d_in, db_in, d_out, _ = with_grads(ops.mlp, tensors, dy, "silu")
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[[0, 1, 2, 4]]).all()
    assert not torch.isfinite(d_in).all()
    assert not torch.isfinite(db_in).all()
    assert not torch.isfinite(d_out).all()
    assert torch.isfinite(dx[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (3, 4), (1, 2), (0, 3), (0, 1, 2, 3, 4)])
def test_only_what_is_needed(needed: tuple[int, ...], activation: str) -> None:
    assert_only_needed(ops.mlp, plain, operands(), torch.randn(17, 19), needed, activation)


def test_biases_may_be_absent() -> None:
    x, w_in, _, w_out, _ = operands()
    leaves = [t.clone().requires_grad_() for t in (x, w_in, w_out)]
    ops.mlp(leaves[0], leaves[1], None, leaves[2], None).sum().backward()
    theirs = [t.clone().requires_grad_() for t in (x, w_in, w_out)]
    plain(theirs[0], theirs[1], None, theirs[2], None).sum().backward()
    for a, b in zip(leaves, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ops.MLP_ACTIVATIONS)
def test_saves_two_tensors_for_the_backward(activation: str) -> None:
    assert saved_shapes(ops.mlp, operands(), activation) == [(17, 24), (17, 40)]


@every_backend
def test_opcheck(backend: str) -> None:
    tensors = operands(5, 4, 6, 3)
    assert_registered(
        backend,
        ("mlp", *(t.clone().requires_grad_() for t in tensors), "silu", True),
        ("mlp_dz", torch.randn(5, 3), tensors[3], torch.randn(5, 6), "gelu", True, True),
    )


def test_what_does_not_fit_is_named() -> None:
    x, w_in, b_in, w_out, b_out = operands()
    with pytest.raises(ValueError, match="unknown activation 'none': use one of 'relu'"):
        ops.mlp(x, w_in, b_in, w_out, b_out, "none")
    with pytest.raises(ValueError, match=r"w_out \(40, 19\) do not fit"):
        ops.mlp(x, w_in, b_in, w_out.t(), b_out)
    with pytest.raises(ValueError, match=r"b_in \(19,\) must be \(40,\)"):
        ops.mlp(x, w_in, b_out, w_out, b_out)
    with pytest.raises(TypeError, match=r"x is torch.float32 but b_out is torch.float16"):
        ops.mlp(x, w_in, b_in, w_out, b_out.half())
    with pytest.raises(ValueError, match="needs keep=True"):
        torch.ops.spu.mlp.reference(x, w_in.requires_grad_(), b_in, w_out, b_out, "silu", False)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ops.mlp(x, w_in, b_in, w_out, b_out).sum(), w_in, create_graph=True)
