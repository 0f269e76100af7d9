"""A mixture of experts as one op: results and gradients beside the truth, which are made, and where they go."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from numeric import assert_close_to_truth, assert_equal
from op_checks import gradients, leaves_of
from torch import Tensor, nn

from spu.common.flops import flop_formulas
from spu.ops import GATED_ACTIVATIONS, backends, open_scope
from spu.ops.experts import ExpertsForm, gated_experts
from spu.ops.schema import overload
from spu.ops.sink import BackwardScope
from spu.precision import MainGrads

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
EXPERTS, WIDTH, HIDDEN, TOKENS, TOP = 5, 24, 20, 13, 2


def routes(kind: str) -> Tensor:
    """Ids [TOKENS, TOP] of experts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP).indices
    if kind == "one for all":
        ids = torch.full_like(ids, 2)  # twice the same, too
    elif kind == "one row":
        ids = torch.where(ids == 1, 0, ids)
        ids[4, 1] = 1
    elif kind == "nobody":
        ids = torch.where(ids == 3, EXPERTS, ids)
    return ids


def values() -> list[Tensor]:
    """x, scores, w_gate_up, w_down."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((TOKENS, WIDTH), (TOKENS, TOP))]
    made[1] = made[1].softmax(-1)
    made.append(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH, generator=generator) * WIDTH**-0.5)
    made.append(torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator) * HIDDEN**-0.5)
    return made


def plain(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, activation: str) -> Tensor:
    """transformers' loop over experts."""
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        place, token = torch.where(ids.t() == e)
        gate, up = F.linear(x[token], w_gate_up[e]).chunk(2, dim=-1)
        y = F.linear(ACTIVATIONS[activation](gate) * up, w_down[e]) * scores[token, place, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out


@pytest.mark.parametrize(("wide", "narrow"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["spread", "one for all", "one row", "nobody"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_and_gradients(wide: torch.dtype, narrow: torch.dtype, kind: str, backend: str) -> None:
    given, ids = [value.to(wide) for value in values()], routes(kind)
    for activation in GATED_ACTIVATIONS if kind == "spread" else ("silu",):
        leaves = leaves_of(given, wide)
        x, scores, *weights = leaves
        out = gated_experts(x, ids, scores, *weights, ExpertsForm(narrow, backend, activation))
        found = gradients(out, leaves)
        rounded, exact = (
            gradients(plain(*leaves, ids, activation), leaves)
            for leaves in (leaves_of(given, narrow), leaves_of(given, torch.float64))
        )
        for i, (a, b, truth) in enumerate(zip(found, rounded, exact, strict=True)):
            assert a.dtype == wide
            eps = torch.finfo(narrow).eps * float(truth.abs().max())
            assert_close_to_truth(a, b.to(wide), truth, eps=eps, name=f"{activation} {i}")
        with torch.no_grad():
            assert_equal(gated_experts(x, ids, scores, *weights, ExpertsForm(narrow, backend, activation)), found[0])


@pytest.mark.parametrize("needs", list(product([False, True], repeat=4)), ids=str)
def test_only_what_is_wanted_is_made(needs: tuple[bool, ...]) -> None:
    """Of x, the scores, both weights: experts that are frozen, a router that alone is trained."""
    form = ExpertsForm(torch.bfloat16, "cpu", "silu")

    def run(wanted: tuple[bool, ...]) -> list[Tensor]:
        x, scores, *weights = (v.clone().requires_grad_(want) for v, want in zip(values(), wanted, strict=True))
        y = gated_experts(x, routes("spread"), scores, *weights, form)
        if y.requires_grad:
            y.sum().backward()
        return [x, scores, *weights]

    for wanted, one, whole in zip(needs, run(needs), run((True,) * 4), strict=True):
        assert (one.grad is None) == (not wanted)
        if wanted:
            assert_equal(one.grad, whole.grad)  # type: ignore[arg-type]


def scaled_backward(weights: list[nn.Parameter], ids: Tensor, scale: float, broken: float = 0.0) -> Tensor:
    """Two backwards into main gradients; return found_inf."""
    x, scores = (value.to(weights[0].dtype) for value in values()[:2])
    scope = BackwardScope(torch.tensor([scale]), torch.tensor([1 / scale]), torch.zeros(1))
    for part in (slice(0, 7), slice(7, None)):
        form = ExpertsForm(weights[0].dtype, "cpu", "silu")
        y = gated_experts(x[part].requires_grad_(), ids[part], scores[part], *weights, form)
        dy = torch.ones_like(y) * scale
        dy[0, 0] += broken
        open_scope(y, scope).backward(dy)
    return scope.found_inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["spread", "one row", "one for all"])
def test_main_gradients_are_unscaled_and_summed(dtype: torch.dtype, kind: str) -> None:
    weights = [nn.Parameter(value.to(dtype)) for value in values()[2:]]
    with MainGrads(weights) as main:
        for _ in range(2):  # the second step's are stored over the first one's
            main.begin_step()
            assert not scaled_backward(weights, routes(kind), 64.0).item()
        found = [w.grad.clone() for w in weights]  # type: ignore[union-attr]
    x, scores, *wide = (value.to(dtype).double().requires_grad_() for value in values())
    expected = torch.autograd.grad(plain(x, scores, *wide, routes(kind), "silu").sum(), wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * torch.finfo(dtype).eps * float(b.abs().max()))
    if kind == "one for all":
        assert not any(grad[e].any() for grad in found for e in range(EXPERTS) if e != 2)


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_found(broken: float) -> None:
    weights = [nn.Parameter(value.half()) for value in values()[2:]]
    with MainGrads(weights) as main:
        main.begin_step()
        assert scaled_backward(weights, routes("spread"), 8.0, broken).item() == 1


def test_an_fp32_gradient_outside_a_scope_is_added_in_place() -> None:
    weights = [nn.Parameter(value) for value in values()[2:]]
    x, scores = values()[:2]
    form = ExpertsForm(torch.float32, "cpu", "silu")

    def backward() -> None:
        gated_experts(x, routes("one row"), scores, *weights, form).sum().backward()

    backward()
    once, places = [w.grad.clone() for w in weights], [w.grad.data_ptr() for w in weights]  # type: ignore[union-attr]
    versions = [w.grad._version for w in weights]  # type: ignore[union-attr]
    backward()
    for w, grad, place, version in zip(weights, once, places, versions, strict=True):
        assert w.grad.data_ptr() == place  # type: ignore[union-attr]
        assert w.grad._version > version  # type: ignore[union-attr]
        assert_equal(w.grad, grad + grad)  # type: ignore[arg-type]


def test_a_weight_that_is_no_leaf_gets_its_gradient() -> None:
    """As an adapter's, which adds to a frozen one."""
    x, scores, w_gate_up, w_down = values()
    delta = torch.zeros_like(w_down).requires_grad_()
    form = ExpertsForm(torch.float32, "cpu", "silu")
    y = gated_experts(x, routes("spread"), scores, w_gate_up, w_down + delta, form)
    expected = torch.autograd.grad(plain(x, scores, w_gate_up, w_down + delta, routes("spread"), "silu").sum(), delta)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), delta), expected)


def test_second_derivatives_are_refused() -> None:
    x, scores, *weights = leaves_of(values(), torch.float32)
    y = gated_experts(x, routes("spread"), scores, *weights, ExpertsForm(torch.float32, "cpu", "silu"))
    with pytest.raises(RuntimeError, match="spu.ops.experts has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [-1, EXPERTS + 1])
def test_ids_that_are_no_experts_are_refused(backend: str, wrong: int) -> None:
    ids = routes("spread")
    ids[3, 1] = wrong
    x, scores, *weights = values()
    with pytest.raises((RuntimeError, ValueError), match="not in"):
        gated_experts(x, ids, scores, *weights, ExpertsForm(torch.float32, backend, "silu"))


def operands(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op, by its name."""
    x, scores, w_gate_up, w_down = (value.to(dtype) for value in values())
    order, places, ends = overload("experts_order", "reference")(routes("nobody"), EXPERTS)
    tokens = (order // TOP)[:, None]
    rows = x[tokens[:, 0]]
    y, gate, up = overload("experts_mlp", "reference")(rows, ends, w_gate_up, w_down, "silu", True)
    return {
        "experts_order": (routes("nobody"), EXPERTS),
        "experts_mlp": (rows, ends, w_gate_up, w_down, "silu", True),
        "experts_dh": (rows, ends, w_down, gate, up, "gelu"),
        "experts_dx": (gate, up, ends, w_gate_up),
        "experts_dw": ([gate, up], rows, ends),
        "rows_sum": (y, places, scores.float(), torch.float32),
        "rows_dot": (x, y, places),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(operands(torch.float32)))
def test_kernels_agree_with_their_reference_and_their_fake_form(name: str, dtype: torch.dtype) -> None:
    arguments = operands(dtype)[name]
    results = [overload(name, backend)(*arguments) for backend in ("cpu", "reference")]
    mine, reference = (one if isinstance(one, tuple) else (one,) for one in results)
    eps = 4 * torch.finfo(dtype).eps
    for a, b in zip(mine, reference, strict=True):
        if a.dtype == torch.int64:
            assert_equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=eps * max(float(b.abs().max()), 1.0))
    torch.library.opcheck(overload(name, "cpu"), arguments, test_utils=("test_schema", "test_faketensor"))


def test_products_are_counted_whatever_the_router_chose() -> None:
    found = operands(torch.float32)
    formulas = {packet.__name__: formula for packet, formula in flop_formulas().items()}

    def count(name: str, *arguments: Any) -> int:
        return formulas[name](*(a.shape if isinstance(a, Tensor) else a for a in arguments))  # type: ignore[no-any-return]

    one = 2 * TOKENS * TOP * WIDTH * HIDDEN
    assert count("experts_mlp", *found["experts_mlp"]) == 3 * one
    assert count("experts_dh", *found["experts_dh"]) == one
    assert count("experts_dx", *found["experts_dx"]) == 2 * one
    rows, gate = found["experts_dh"][0].shape, found["experts_dx"][0].shape
    assert formulas["experts_dw_"]([gate, gate], rows, (EXPERTS,)) == 2 * one
