"""linear_act against plain torch: bits in fp32 on the reference, the error bound everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from backend_params import every_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close_to_truth, assert_equal
from op_checks import assert_registered, with_grads
from torch import Tensor, nn

from spu import ops
from spu.ops import schema

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def compare(backend, dtype, activation, x, weight, bias, dy):
    """Forward and every gradient of the op within the bound; the truth is fp64 on the same (rounded) operands."""
    operands = [v.to(dtype) for v in (x, weight, bias) if v is not None]
    dy = dy.to(dtype)

    def plain(x, weight, bias=None):
        return ACTIVATIONS[activation](F.linear(x, weight, bias))

    with ops.use_backend(backend):
        ours = with_grads(lambda x, w, b=None: ops.linear_act(x, w, b, activation), operands, dy)
    peer = with_grads(plain, operands, dy)
    truth = with_grads(plain, [v.double() for v in operands], dy.double())
    for name, a, p, t in zip(["y", "dx", "dw", "db"], ours, peer, truth):
        # 2 units in the last place: the stored z and dz are roundings of their own, even where plain torch, which
        # rounds in other places, happens to be nearer.
        scale = float(t[torch.isfinite(t)].abs().max()) if t.numel() else 0.0
        eps = 2 * torch.finfo(dtype).eps * max(scale, 1e-30)
        assert_close_to_truth(a, p, t, eps=eps, name=f"{name} ({backend}, {activation})")


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("leading", [(7,), (3, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_fp32_has_plain_torchs_bits(activation: str, leading: tuple[int, ...], with_bias: bool) -> None:
    torch.set_num_threads(1)
    operands = [torch.randn(*leading, 33), torch.randn(17, 33), *([torch.randn(17)] if with_bias else [])]
    dy = torch.randn(*leading, 17)
    with ops.use_backend("reference"):
        ours = with_grads(lambda x, w, b=None: ops.linear_act(x, w, b, activation), operands, dy)
    plain = with_grads(lambda x, w, b=None: ACTIVATIONS[activation](F.linear(x, w, b)), operands, dy)
    for name, a, p in zip(["y", "dx", "dw", "db"], ours, plain):
        assert_equal(a, p, name)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_of_the_reference(activation: str, with_bias: bool) -> None:
    operands = [torch.randn(2, 3, 4), torch.randn(5, 4), *([torch.randn(5)] if with_bias else [])]
    leaves = [v.double().requires_grad_() for v in operands]
    assert torch.autograd.gradcheck(lambda x, w, b=None: ops.linear_act(x, w, b, activation), leaves)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_bound(backend: str, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = torch.randn(37, 70), torch.randn(45, 70) / 8, torch.randn(45)
    compare(backend, dtype, activation, x, weight, bias, torch.randn(37, 45))


@every_backend
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 48), (5, 1, 9), (33, 130, 1), (2, 257, 65)])
def test_bound_on_ragged_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    rows, k, n = shape
    operands = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    compare(backend, torch.float16, "gelu", *operands, torch.randn(rows, n))
    compare(backend, torch.bfloat16, "silu", operands[0], operands[1], None, torch.randn(rows, n))


@every_backend
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ops.ACTIVATIONS),
)
def test_bound_on_any_shape(backend: str, rows: int, k: int, n: int, dtype: torch.dtype, activation: str) -> None:
    operands = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    compare(backend, dtype, activation, *operands, torch.randn(rows, n))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strided_operands(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(24, 3, 11).transpose(0, 2)  # [11, 3, 24]
    weight = torch.randn(24, 9).t() / 5  # [9, 24]
    bias = torch.randn(18)[::2]
    dy = torch.randn(1, 3, 1).expand(11, 3, 9)
    compare(backend, dtype, "gelu_tanh", x, weight, bias, dy)
    compare(backend, dtype, "none", x, weight, bias, dy)


@every_backend
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("leading", [(4,), (0,), (2, 0), ()])
def test_leading_dimensions_and_empty_inputs(backend: str, activation: str, leading: tuple[int, ...]) -> None:
    compare(
        backend, torch.float32, activation, torch.randn(*leading, 6), torch.randn(5, 6), torch.randn(5),
        torch.randn(*leading, 5),
    )  # fmt: skip


@every_backend
def test_no_input_features_leaves_the_bias(backend: str) -> None:
    bias = torch.randn(5)
    with ops.use_backend(backend):
        y = ops.linear_act(torch.empty(3, 0), torch.empty(5, 0), bias, "relu")
    assert_equal(y, bias.relu().expand(3, 5), "y")


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_non_finite_values_stay_in_their_rows(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Whether a value meets torch's vectors or the scalar rest of a row: 37 columns have both."""
    x = torch.randn(6, 16).to(dtype)
    x[1, 3], x[4, 0], x[5, 2] = float("nan"), float("inf"), -float("inf")
    weight = torch.rand(37, 16).to(dtype) + 0.5
    with ops.use_backend(backend):
        y = ops.linear_act(x, weight, None, activation)
    expected = ACTIVATIONS[activation](F.linear(x.double(), weight.double()))
    assert_equal(y.isnan(), expected.isnan(), "isnan(y)")
    assert_equal(y.isinf(), expected.isinf(), "isinf(y)")


@every_backend
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_non_finite_gradients_are_passed_on(backend: str, activation: str) -> None:
    operands = [torch.rand(4, 5) + 0.1, torch.rand(3, 5) + 0.1, torch.rand(3)]
    dy = torch.ones(4, 3)
    dy[2, 1] = float("inf")
    with ops.use_backend(backend):
        _, dx, dw, db = with_grads(lambda x, w, b: ops.linear_act(x, w, b, activation), operands, dy)
    assert not torch.isfinite(dx[2]).any()
    assert torch.isfinite(dx[[0, 1, 3]]).all()
    assert not torch.isfinite(dw[1]).any()
    assert not torch.isfinite(db[1])
    assert torch.isfinite(db[[0, 2]]).all()


@every_backend
def test_an_accumulator_beyond_fp16_is_rounded_once(backend: str) -> None:
    """Partial sums over 65504 do not overflow where the result fits."""
    x = torch.tensor([[200.0, 200.0]]).half()
    weight = torch.tensor([[400.0, -399.0]]).half()
    with ops.use_backend(backend):
        assert ops.linear_act(x, weight).item() == 200.0
        assert ops.linear_act(x, -weight, torch.tensor([300.0]).half()).item() == 100.0


@every_backend
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_made(backend: str, needs: tuple[bool, bool, bool]) -> None:
    operands = [torch.randn(4, 5), torch.randn(3, 5), torch.randn(3)]
    for operand, need in zip(operands, needs):
        operand.requires_grad_(need)
    with ops.use_backend(backend):
        ops.linear_act(*operands, "silu").sum().backward()
    assert [operand.grad is not None for operand in operands] == list(needs)


@pytest.mark.parametrize(
    ("activation", "grad", "shape"), [("gelu", True, (4, 3)), ("gelu", False, (0,)), ("relu", True, (0,))]
)
def test_preact_is_kept_only_where_a_backward_needs_it(
    monkeypatch: pytest.MonkeyPatch, activation: str, grad: bool, shape: tuple[int, ...]
) -> None:
    seen = []
    real = schema.overload("linear", "reference")

    def spy(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setitem(schema._OVERLOADS, ("linear", "reference"), spy)
    with ops.use_backend("reference"), torch.set_grad_enabled(grad):
        ops.linear_act(torch.randn(4, 5), torch.randn(3, 5, requires_grad=True), None, activation)
    assert seen[0][1].shape == shape


def test_autocast_computes_in_its_dtype_like_torchs_linear() -> None:
    x, weight, bias = torch.randn(5, 16), nn.Parameter(torch.randn(7, 16)), nn.Parameter(torch.randn(7))
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.use_backend("reference"):
        y = ops.linear_act(x, weight, bias)
        mixed = ops.linear_act(x.half(), weight, bias)
        assert y.dtype == mixed.dtype == F.linear(x, weight, bias).dtype == torch.bfloat16
        y.float().square().sum().backward()  # in autocast too: the backward's products must not be narrowed again
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    x16, w16, b16 = x.bfloat16(), weight.detach().bfloat16(), bias.detach().bfloat16()
    expected = F.linear(x16.float(), w16.float(), b16.float()).bfloat16()
    assert_equal(y.detach(), expected, "y")
    dw = ((2 * expected.float()).bfloat16().float().t() @ x16.float()).bfloat16().float()
    assert_equal(weight.grad, dw, "dw")


@every_backend
def test_the_registered_derivative_equals_the_eager_one(backend: str) -> None:
    x, weight, bias = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3)
    dy = torch.randn(4, 3)
    for activation in ops.ACTIVATIONS:
        keep = activation in ("gelu", "gelu_tanh", "silu")

        def registered(x: Tensor, w: Tensor, b: Tensor, activation: str = activation, keep: bool = keep) -> Tensor:
            return schema.overload("linear", backend)(x, w, b, activation, keep)[0]

        with ops.use_backend(backend):
            eager = with_grads(lambda x, w, b, a=activation: ops.linear_act(x, w, b, a), [x, weight, bias], dy)
        for name, ours, other in zip(["y", "dx", "dw", "db"], eager, with_grads(registered, [x, weight, bias], dy)):
            assert_equal(ours, other, f"{name} ({activation})")


def test_differentiating_without_the_kept_preactivation_is_refused() -> None:
    with pytest.raises(ValueError, match="needs keep_preact=True to be differentiated with activation 'gelu'"):
        torch.ops.spu.linear.reference(torch.randn(2, 3, requires_grad=True), torch.randn(4, 3), None, "gelu", False)


def test_meta_and_inference_mode() -> None:
    meta = ops.linear_act(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"), None, "gelu")
    assert meta.shape == (2, 4)
    with torch.inference_mode():
        assert ops.linear_act(torch.ones(2, 3), torch.ones(4, 3)).sum() == 24


@every_backend
def test_opcheck(backend: str) -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    weight, bias = torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    assert_registered(backend, ("linear", x, weight, bias, "gelu", True), ("linear", x, weight, None, "relu", False))
    dz, x = torch.randn(2, 3, 5).half(), torch.randn(2, 3, 8).half()
    control = torch.full((1,), 0.5), torch.zeros(1)
    assert_registered(
        backend,
        ("linear_dz", dz, torch.randn(2, 3, 5).half(), "silu"),
        ("linear_dx", dz, torch.randn(5, 8).half()),
        ("linear_dw", dz, x),
        ("linear_db", dz),
        ("linear_dw_", dz, x, torch.zeros(5, 8), *control, True),
        ("linear_db_", dz, torch.zeros(5), *control, False),
    )


def compiled_and_eager_gradients(backend: str, compiler: str) -> None:
    weight, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
    x = torch.randn(4, 8)

    def net(x: Tensor) -> Tensor:
        return ops.linear_act(torch.tanh(ops.linear_act(x, weight, bias, "gelu")), weight.t().contiguous())

    with ops.use_backend(backend):
        torch.compile(net, fullgraph=True, backend=compiler)(x).square().sum().backward()
        grads = [weight.grad, bias.grad]
        weight.grad = bias.grad = None
        net(x).square().sum().backward()
    for name, grad, parameter in zip(["dw", "db"], grads, [weight, bias]):
        torch.testing.assert_close(grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.leaks_threads  # Dynamo's progress monitor
@every_backend
def test_compiles_whole_forward_and_backward(backend: str) -> None:
    compiled_and_eager_gradients(backend, "aot_eager")


@pytest.mark.leaks_threads  # inductor keeps a pool of compile workers
def test_compiles_whole_with_inductor() -> None:
    compiled_and_eager_gradients("reference", "inductor")


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    y = ops.linear_act(x, weight).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "'tanh'.*'none', 'relu', 'gelu', 'gelu_tanh', 'silu'", ((2, 3), (4, 3), None, "tanh")),
        (ValueError, r"\(2, 3\).*\(4, 5\)", ((2, 3), (4, 5), None, "none")),
        (ValueError, r"bias \(3,\).*must be \(4,\)", ((2, 3), (4, 3), (3,), "none")),
        (ValueError, r"x \(\) does not fit", ((), (4, 3), None, "none")),
    ],
)
def test_bad_shapes_are_named(error, message, arguments) -> None:
    x, weight, bias, activation = arguments
    with pytest.raises(error, match=message):
        ops.linear_act(torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias), activation)


def test_bad_dtypes_and_devices_are_named() -> None:
    with pytest.raises(TypeError, match=r"x is torch.float16 but weight is torch.float32.*\.to\(\)"):
        ops.linear_act(torch.ones(2, 3).half(), torch.ones(4, 3))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        ops.linear_act(torch.ones(2, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="x is on cpu but weight is on meta"):
        ops.linear_act(torch.ones(2, 3), torch.ones(4, 3, device="meta"))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (2, 1, 6), (6,)])
def test_a_result_may_be_changed_in_place(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The reference returned a view of the product's rows for 3-d inputs, which autograd then refused to change."""
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(5, 6, dtype=dtype, requires_grad=True)
    with ops.use_backend(backend):
        for activation in ("none", "gelu"):
            y = ops.linear_act(x, weight, None, activation)
            assert not y._is_view()
            y += 1
            y.sum().backward()
        y = ops.gated_mlp(x, weight, weight, torch.randn(3, 5, dtype=dtype))
        y += 1
        y.sum().backward()
