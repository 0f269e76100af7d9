"""The ops that sinks call: main gradients of a linear layer, unscaling, and which of them a backward calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from test_ops_sink import Recorder, scope_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spu import ops
from spu.precision import MainGrads


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 30, 20), (1, 7, 5), (3, 1, 1), (0, 4, 3), (65, 129, 33)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_main_gradients_of_a_linear(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], accumulate: bool
) -> None:
    rows, k, n = shape
    dz, x = (torch.randn(rows, n) * 64).to(dtype), torch.randn(rows, k).to(dtype)
    inv_scale, found_inf = torch.tensor([1 / 1024]), torch.zeros(1)
    start = torch.randn(n, k) if accumulate else torch.full((n, k), float("nan"))  # a store must not load
    main_grad, bias_grad = start.clone(), start[:, 0].clone()
    ops.linear_dw_(dz, x, ops.MainGrad(main_grad, inv_scale, found_inf, accumulate), backend=backend)
    ops.linear_db_(dz, ops.MainGrad(bias_grad, inv_scale, found_inf, accumulate), backend=backend)

    def expected(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        dw = dz.to(kind).t() @ x.to(kind) * inv_scale.to(kind)
        db = dz.to(kind).sum(0) * inv_scale.to(kind)
        return (dw + start.to(kind), db + start[:, 0].to(kind)) if accumulate else (dw, db)

    eps = 4 * torch.finfo(torch.float32).eps * max(1.0, float(rows) / 8)
    for name, actual, plain, truth in zip(
        ("dw", "db"), (main_grad, bias_grad), expected(torch.float32), expected(torch.float64)
    ):
        assert_close_to_truth(actual, plain, truth, eps=eps, name=name)
    assert found_inf.item() == 0


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["dz", "x"])
def test_found_inf_sees_every_value(backend: str, bad: float, where: str) -> None:
    for row, column in ((0, 0), (12, 6), (5, 3)):
        dz, x = torch.randn(13, 7).half(), torch.randn(13, 7).half()
        (dz if where == "dz" else x)[row, column] = bad
        found = torch.zeros(1)
        into = ops.MainGrad(torch.zeros(7, 7), torch.ones(1), found, True)
        ops.linear_dw_(dz, x, into, backend=backend)
        assert found.item() == 1, (row, column)
        ops.linear_dw_(torch.ones_like(dz), torch.ones_like(x), into, backend=backend)
        assert found.item() == 1  # never reset
        if where == "dz":
            found.zero_()
            ops.linear_db_(dz, ops.MainGrad(torch.zeros(7), torch.ones(1), found, False), backend=backend)
            assert found.item() == 1, (row, column)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unscale(backend: str, dtype: torch.dtype) -> None:
    grad = torch.randn(9, 14).to(dtype).t()
    main_grad, inv_scale, found = torch.full((14, 9), float("inf")), torch.tensor([0.3]), torch.zeros(1)
    ops.unscale_(grad, ops.MainGrad(main_grad, inv_scale, found, False), backend=backend)
    assert_equal(main_grad, grad.float() * 0.3, "stored")
    ops.unscale_(grad, ops.MainGrad(main_grad, inv_scale, found, True), backend=backend)
    torch.testing.assert_close(main_grad, grad.float() * 0.6)
    assert found.item() == 0
    grad[13, 8] = float("nan")
    ops.unscale_(grad, ops.MainGrad(main_grad, inv_scale, found, True), backend=backend)
    assert found.item() == 1
    with pytest.raises(ValueError, match=r"must be float32 of shape \(14, 9\)"):
        ops.unscale_(grad, ops.MainGrad(torch.zeros(9, 14), inv_scale, found, False))


class OpNames(TorchDispatchMode):
    """The names of spu's ops that are run inside, outermost ones."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "spu":
            self.seen.append(func._schema.name.removeprefix("spu::"))
        return func(*args, **(kwargs or {}))


@every_backend
@pytest.mark.parametrize("bias_first", [False, True])
def test_sinks_get_weight_and_bias_together_where_the_backend_has_a_kernel(backend: str, bias_first: bool) -> None:
    """linear_dz_dx and linear_dw_db_ by backends with kernels for them, their parts elsewhere; the same gradients."""
    layer, x = nn.Linear(20, 24).half(), torch.randn(30, 20).half().requires_grad_()
    mains, scope = MainGrads(layer.parameters()), scope_of()
    for _ in range(2):
        mains.begin_step()
        if bias_first:  # the bias has a gradient when the weight's first one comes: one adds, the other stores
            ops.open_scope(layer.bias.sum() * 0, scope).backward()
        with ops.use_backend(backend):
            y = ops.linear_act(x, layer.weight, layer.bias, "gelu")
        x.grad = None
        with OpNames() as names:
            ops.open_scope((y.float().square().sum() * 1024), scope).backward()
    expected = {"linear_dz", "linear_dx", "linear_dw_", "linear_db_"}
    if ops.has_kernel("linear_dz_dx", backend):
        expected = {"linear_dz_dx", "linear_dw_", "linear_db_"} if bias_first else {"linear_dz_dx", "linear_dw_db_"}
    assert set(names.seen) == expected, names.seen
    twin, wide = nn.Linear(20, 24).double(), x.detach().double().requires_grad_()
    twin.load_state_dict(layer.state_dict())
    F.gelu(twin(wide)).square().sum().backward()
    half = [tensor.detach().half().requires_grad_() for tensor in (wide, *twin.parameters())]
    F.gelu(F.linear(*half)).float().square().sum().backward()
    for name, made, plain, truth in zip(("dx", "dw", "db"), (x, *layer.parameters()), half, (wide, *twin.parameters())):
        scaled = made.grad / 1024 if made is x else made.grad
        rounded = plain.grad.to(scaled.dtype)
        assert_close_to_truth(scaled, rounded, truth.grad, eps=2e-3 * float(truth.grad.abs().max()), name=name)
    assert scope.found_inf.item() == 0


def test_a_sink_of_ones_own_gets_weight_and_bias_one_by_one() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    sinks = Recorder(), Recorder()
    for parameter, sink in zip(layer.parameters(), sinks):
        ops.attach_sink(parameter, sink)
    ops.open_scope(ops.linear_act(x, layer.weight, layer.bias).sum(), scope_of()).backward()
    assert (len(sinks[0].weights), len(sinks[1].biases)) == (1, 1)
