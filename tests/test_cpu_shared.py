"""Products that share an operand, and those that add to a residual: the bits of the products one by one.

Runs on every instruction set, like test_cpu_kernels.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from numeric import assert_equal
from test_cpu_fused import values
from test_cpu_kernels import DTYPES, OPS, scalar, variants
from torch import Tensor

_C = sys.modules["spu._C"]
HALVES = DTYPES[1:]
# rows, in, widths: one that the rule for tiles leaves to AVX-512 between two that it does not, ragged, several groups
# of columns, blocks of k, ranges of k, empty in each dimension
SHAPES = [
    (64, 64, (64, 3, 96)),
    (33, 65, (17, 300, 40)),
    (5, 3, (1, 7)),
    (40, 1700, (70, 270)),
    (3, 16500, (40, 33)),
    (0, 4, (6, 2)),
    (4, 0, (6, 2)),
    (4, 6, (0, 2)),
]


@pytest.fixture(autouse=True, params=["every size", "by the rule"] if _C.isa() == "amx" else ["by the rule"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products on tiles: all of them, or those that the rule that ships gives them."""
    torch.manual_seed(0)
    rules = {name: _C.tile_rule(name) for name in ("fp16", "bf16")} if request.param == "every size" else {}
    for name in rules:
        _C.set_tile_rule(name, 1, 1, 1)
    yield
    for name, rule in rules.items():
        _C.set_tile_rule(name, *rule)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return OPS.linear.cpu(x, w, bias, "none", False)[0]


def check_each(x: Tensor, weights: list[Tensor], biases: list[Tensor], name: str) -> None:
    found = OPS.linear_each.cpu(x, weights, biases)
    for i, (y, w) in enumerate(zip(found, weights, strict=True)):
        assert y.is_contiguous()
        assert_equal(y, linear(x, w, biases[i] if biases else None), f"{name}[{i}]")


def gradients(dzs: list[Tensor], x: Tensor, accumulate: bool) -> tuple[list[Tensor], float, list[Tensor], float]:
    """What the shared op makes, and the products one by one, each with found_inf."""
    ours = [torch.ones(dz.shape[-1], x.shape[-1]) for dz in dzs]
    plain, flags = [grad.clone() for grad in ours], (scalar(0.0), scalar(0.0))
    OPS.linear_dw_each_.cpu(dzs, x, ours, scalar(0.25), flags[0], accumulate)
    for dz, grad in zip(dzs, plain, strict=True):
        OPS.linear_dw_.cpu(dz, x, grad, scalar(0.25), flags[1], accumulate)
    return ours, flags[0].item(), plain, flags[1].item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_one_x_have_the_bits_of_each(shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
    rows, inner, widths = shape
    weights = [values(n, inner, dtype=dtype) for n in widths]
    dzs = [values(rows, n, dtype=dtype) for n in widths]
    for name, x in variants(values(rows, inner, dtype=dtype)).items():
        check_each(x, weights, [], name)
        check_each(x, [w.t().contiguous().t() for w in weights], [values(n, dtype=dtype) for n in widths], name)
        for accumulate in (False, True):
            ours, found, plain, expected = gradients(dzs, x, accumulate)
            assert found == expected == 0.0
            for i, (grad, other) in enumerate(zip(ours, plain, strict=True)):
                assert_equal(grad, other, f"{name}: gradient {i}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("where", ["x", "second weight", "last dz"])
def test_what_is_not_finite_stays_with_its_product(where: str, dtype: torch.dtype) -> None:
    x, weights = values(70, 64, dtype=dtype), [values(n, 64, dtype=dtype) for n in (64, 300, 96)]
    dzs = [values(70, n, dtype=dtype) for n in (64, 300, 96)]
    (x if where == "x" else weights[1] if where == "second weight" else dzs[2])[33, 5] = float("inf")
    check_each(x, weights, [], where)
    ours, found, plain, expected = gradients(dzs, x, True)
    assert found == expected == float(where != "second weight")
    for grad, other in zip(ours, plain, strict=True):
        assert_equal(grad, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("first", [64, 3, 0], ids=["like it", "narrow", "empty"])
def test_what_an_earlier_call_has_packed_is_not_taken(first: int, dtype: torch.dtype) -> None:
    """Nor where this call's first product packs nothing on tiles: it is another kernel's, or empty."""
    x, weights = values(64, 64, dtype=dtype), [values(n, 64, dtype=dtype) for n in (first, 64)]
    dzs, grads = [values(64, n, dtype=dtype) for n in (first, 64)], [torch.zeros(n, 64) for n in (first, 64)]
    one, flag, changed = scalar(1.0), scalar(0.0), x * -0.5
    y, grad = linear(changed, weights[1], None), torch.zeros(64, 64)
    OPS.linear_dw_.cpu(dzs[1], changed, grad, one, flag, False)
    OPS.linear_each.cpu(x, weights[1:], [])
    OPS.linear_dw_each_.cpu(dzs[1:], x, grads[1:], one, flag, False)
    x.copy_(changed)
    OPS.linear_dw_each_.cpu(dzs, x, grads, one, flag, False)
    assert_equal(grads[1], grad)
    x.mul_(-2)
    OPS.linear_each.cpu(x, weights[1:], [])
    x.copy_(changed)
    assert_equal(OPS.linear_each.cpu(x, weights, [])[1], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_added_as_it_would_be_stored(shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
    rows, inner, (out, *_) = shape
    x, w, bias = values(rows, inner, dtype=dtype), values(out, inner, dtype=dtype), values(out, dtype=dtype)
    for b in (None, bias):
        y = linear(x, w, b)
        for addend in (torch.randn(rows, out).to(dtype), torch.randn(rows, out), torch.randn(out, rows).to(dtype).t()):
            found = OPS.linear_add.cpu(x, w, b, addend)
            assert found.is_contiguous()
            assert_equal(found, addend + y)
            assert_equal(
                OPS.linear_add.reference(x, w, b, addend), addend + OPS.linear.reference(x, w, b, "none", False)[0]
            )
    gate_up = values(out, inner, dtype=dtype), values(out, inner, dtype=dtype)
    down, addend = values(inner, out, dtype=dtype), torch.randn(rows, inner)
    mlp, added = (
        OPS.gated_mlp.cpu(x, *gate_up, down, "silu", True),
        OPS.gated_mlp_add.cpu(x, *gate_up, down, "silu", addend),
    )
    for found, expected in zip(added, (addend + mlp[0], *mlp[1:]), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sum_that_overflows_before_it_is_added(dtype: torch.dtype) -> None:
    """The product is rounded first: above the dtype's range it is infinite, whatever is added."""
    largest = torch.finfo(dtype).max
    x, w = torch.full((40, 2), largest).to(dtype), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).to(dtype)
    addend = torch.full((40, 2), -largest)
    assert_equal(OPS.linear_add.cpu(x, w, None, addend), addend + linear(x, w, None))
    assert bool(OPS.linear_add.cpu(x, w, None, addend)[:, 0].isinf().all())


def test_wrong_operands_are_refused_by_name() -> None:
    x, w, flag = torch.ones(4, 8), torch.ones(3, 8), scalar(0.0)
    with pytest.raises(ValueError, match="linear_each: 1 biases for 2 weights"):
        OPS.linear_each.cpu(x, [w, w], [torch.ones(3)])
    with pytest.raises(ValueError, match="linear_dw_each_: 1 dzs for 2 main_grads"):
        OPS.linear_dw_each_.cpu([torch.ones(4, 3)], x, [torch.zeros(3, 8)] * 2, scalar(1.0), flag, True)
    with pytest.raises(ValueError, match=r"linear_add: addend \[4, 8\] does not fit x \[4, 8\] and weight \[3, 8\]"):
        OPS.linear_add.cpu(x, w, None, x)
    with pytest.raises(ValueError, match="linear_add: addend .*but x"):
        OPS.linear_add.cpu(x.half(), w.half(), None, torch.ones(4, 3).bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_library_finds_nothing_wrong(backend: str) -> None:
    x, w, addend = torch.randn(6, 8).half(), torch.randn(5, 8).half(), torch.randn(6, 5)
    check = torch.library.opcheck
    check(getattr(OPS.linear_add, backend), (x, w, w[:, 0].contiguous(), addend))
    check(getattr(OPS.linear_each, backend), (x, [w, w[:3]], []))
    grads = [torch.zeros(5, 8), torch.zeros(3, 8)]
    dzs = [torch.randn(6, 5).half(), torch.randn(6, 3).half()]
    check(getattr(OPS.linear_dw_each_, backend), (dzs, x, grads, scalar(1.0), scalar(0.0), True))
    check(getattr(OPS.gated_mlp_add, backend), (x, w, w, w.t().contiguous(), "silu", torch.randn(6, 8)))
