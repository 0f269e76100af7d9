"""The C++ ops by their overloads torch.ops.spu.*.cpu, against fp64 truth and plain torch in the same dtype.

Runs on the instruction set that spu._C chooses here; test_cpu_isa.py runs this file again on each of the others, by
SPU_CPU_ISA, or on the library that SPU_TEST_LIBRARY names.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS
from numeric import assert_close_to_truth, assert_equal
from together import together
from torch import Tensor


def _load() -> object:
    path = os.environ.get("SPU_TEST_LIBRARY")
    if path is None:
        return pytest.importorskip("spu._C", reason="spu._C is not built here")
    loader = importlib.machinery.ExtensionFileLoader("spu._C", path)
    spec = importlib.util.spec_from_loader("spu._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spu._C"] = module
    loader.exec_module(module)
    return module


C = _load()
import spu.ops  # noqa: E402, F401  (defines the schemas; must not load another spu._C first)

OPS = torch.ops.spu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, out, in: single elements, ragged against every micro-tile (4x8, 6x16, 14x32), several k-blocks and super-blocks,
# several tasks, empty in each dimension
SHAPES = [
    (1, 1, 1), (5, 7, 3), (1, 40, 300), (33, 17, 65), (96, 64, 128), (29, 70, 770), (7, 530, 33), (3, 18, 4500),
    (0, 6, 4), (4, 0, 6), (4, 6, 0),
]  # fmt: skip


def variants(t: Tensor) -> dict[str, Tensor]:
    """The same [rows, cols] values under other strides."""
    wide = torch.zeros(t.shape[0] * 2, t.shape[1] + 3, dtype=t.dtype)
    wide[::2, 2:-1] = t
    doubled = torch.stack((t, t + 1), dim=-1)
    return {
        "contiguous": t.contiguous(),
        "transposed": t.t().contiguous().t(),
        "sliced": wide[::2, 2:-1],
        "every other column": doubled[..., 0],
    }


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, out, inner = shape
    x, w = torch.randn(rows, inner).to(dtype), (torch.randn(out, inner) / (inner + 1) ** 0.5).to(dtype)
    b = torch.randn(out).to(dtype)
    cases = [(bias, name) for bias in (b, None) for name in ACTIVATIONS]
    if inner > 1000:  # how long the sums are is not known where they end; simulated threads take seconds
        cases = [(b, "gelu"), (None, "none")]
    for bias, name in cases:
        act = ACTIVATIONS[name]
        truth_z = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        plain_z = F.linear(x, w, bias)
        y, z = OPS.linear.cpu(x, w, bias, name, True)
        assert_close_to_truth(z, plain_z, truth_z, name=f"z ({name})")
        assert_close_to_truth(y, act(plain_z), act(truth_z), name=f"y ({name})")
        y_only, nothing = OPS.linear.cpu(x, w, bias, name, False)
        assert_equal(y_only, y, "y without preact")
        assert nothing.shape == (0,)
        assert nothing.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_any_strides_is_bit_equal_to_contiguous(dtype: torch.dtype) -> None:
    x, w, dz = torch.randn(37, 50).to(dtype), torch.randn(45, 50).to(dtype), torch.randn(37, 45).to(dtype)
    y, _ = OPS.linear.cpu(x, w, None, "none", False)
    dx, dw, db = OPS.linear_dx.cpu(dz, w), OPS.linear_dw.cpu(dz, x), OPS.linear_db.cpu(dz)
    weights, gradients = variants(w), variants(dz)
    for name, xv in variants(x).items():
        for w_name, wv in weights.items():
            assert_equal(OPS.linear.cpu(xv, wv, None, "none", False)[0], y, f"y, x {name}, weight {w_name}")
        for g_name, gv in gradients.items():
            assert_equal(OPS.linear_dw.cpu(gv, xv), dw, f"dw, dz {g_name}, x {name}")
    for g_name, gv in gradients.items():
        assert_equal(OPS.linear_db.cpu(gv), db, f"db, dz {g_name}")
        for w_name, wv in weights.items():
            assert_equal(OPS.linear_dx.cpu(gv, wv), dx, f"dx, dz {g_name}, weight {w_name}")


def test_linear_of_leading_dimensions_and_expanded_tensors() -> None:
    w = torch.randn(9, 6).half()
    x = torch.randn(4, 3, 5, 6).half().transpose(0, 2)  # leading dimensions that do not merge
    y, z = OPS.linear.cpu(x, w, None, "silu", True)
    assert y.shape == z.shape == (5, 3, 4, 9)
    assert y.is_contiguous()
    assert_equal(y.reshape(-1, 9), OPS.linear.cpu(x.reshape(-1, 6), w, None, "silu", True)[0])
    dz = torch.ones((), dtype=torch.float16).expand(5, 3, 4, 9)  # what sum().backward() sends
    dense = dz.contiguous()
    assert_equal(OPS.linear_dx.cpu(dz, w), OPS.linear_dx.cpu(dense, w))
    assert_equal(OPS.linear_dw.cpu(dz, x), OPS.linear_dw.cpu(dense, x.contiguous()))
    assert_equal(OPS.linear_db.cpu(dz), torch.full((9,), 60.0).half())
    column = torch.randn(6, 1).half().expand(6, 6)
    assert_equal(OPS.linear.cpu(column, w, None, "none", False)[0],
                 OPS.linear.cpu(column.contiguous(), w, None, "none", False)[0])  # fmt: skip
    vector = torch.randn(6).half()
    assert_equal(OPS.linear.cpu(vector, w, None, "none", False)[0],
                 OPS.linear.cpu(vector[None], w, None, "none", False)[0][0])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, out, inner = shape
    x, w = torch.randn(rows, inner).to(dtype), (torch.randn(out, inner) / (inner + 1) ** 0.5).to(dtype)
    dz = torch.randn(rows, out).to(dtype)
    assert_close_to_truth(OPS.linear_dx.cpu(dz, w), dz @ w, dz.double() @ w.double(), name="dx")
    truth_w, truth_b = dz.double().t() @ x.double(), dz.double().sum(0)
    assert_close_to_truth(OPS.linear_dw.cpu(dz, x), dz.t() @ x, truth_w, name="dw")
    assert_close_to_truth(OPS.linear_db.cpu(dz), dz.sum(0), truth_b, name="db")

    inv, found = scalar(0.125), scalar(0.0)
    # fp32 main gradients: the bar is plain torch in fp32 on the widened operands
    plain_w, plain_b = dz.float().t() @ x.float(), dz.float().sum(0)
    main_w, main_b = torch.full((out, inner), float("nan")), torch.full((out,), float("nan"))
    OPS.linear_dw_.cpu(dz, x, main_w, inv, found, False)
    OPS.linear_db_.cpu(dz, main_b, inv, found, False)
    assert_close_to_truth(main_w, 0.125 * plain_w, 0.125 * truth_w, name="main_grad of the weight")
    assert_close_to_truth(main_b, 0.125 * plain_b, 0.125 * truth_b, name="main_grad of the bias")
    start_w, start_b = torch.randn(out, inner), torch.randn(out)
    sum_w, sum_b = start_w.clone(), start_b.clone()
    OPS.linear_dw_.cpu(dz, x, sum_w, inv, found, True)
    OPS.linear_db_.cpu(dz, sum_b, inv, found, True)
    assert_equal(sum_w, start_w + main_w, "accumulated weight gradient")
    assert_equal(sum_b, start_b + main_b, "accumulated bias gradient")
    assert found.item() == 0.0


def test_no_rows_store_zeros_or_leave_alone() -> None:
    dz, x, found = torch.empty(0, 5).half(), torch.empty(0, 3).half(), scalar(0.0)
    for accumulate, expected in ((False, 0.0), (True, 2.0)):
        main_w, main_b = torch.full((5, 3), 2.0), torch.full((5,), 2.0)
        OPS.linear_dw_.cpu(dz, x, main_w, scalar(0.5), found, accumulate)
        OPS.linear_db_.cpu(dz, main_b, scalar(0.5), found, accumulate)
        assert_equal(main_w, torch.full((5, 3), expected))
        assert_equal(main_b, torch.full((5,), expected))
    assert_equal(OPS.linear_dw.cpu(dz, x), torch.zeros(5, 3).half())
    assert found.item() == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("at", [(0, 0), (36, 44), (20, 17)], ids=str)
def test_found_inf_sees_any_element_and_is_never_reset(bad: float, at: tuple[int, int]) -> None:
    for dtype in DTYPES:
        dz, x = torch.randn(37, 45).to(dtype), torch.randn(37, 50).to(dtype)
        dz[at] = bad
        for run in (
            lambda f, dz=dz, x=x: OPS.linear_dw_.cpu(dz, x, torch.zeros(45, 50), scalar(1.0), f, True),
            lambda f, dz=dz: OPS.linear_db_.cpu(dz, torch.zeros(45), scalar(1.0), f, True),
            lambda f, dz=dz: OPS.unscale_.cpu(dz, torch.zeros(37, 45), scalar(1.0), f, False),
        ):
            found = scalar(0.0)
            run(found)
            assert found.item() == 1.0
    OPS.linear_db_.cpu(torch.randn(3, 4), torch.zeros(4), scalar(1.0), found, True)
    assert found.item() == 1.0


def test_a_sum_that_overflows_is_found() -> None:
    dz, x, found = torch.full((4, 3), 3e38), torch.ones(4, 2), scalar(0.0)
    OPS.linear_dw_.cpu(dz, x, torch.zeros(3, 2), scalar(1e-30), found, False)
    assert found.item() == 1.0


def test_padding_of_ragged_tiles_raises_no_alarm() -> None:
    """An infinity times a padding zero is NaN: it must stay in the padding."""
    x = torch.randn(5, 7)
    x[2, 3] = float("inf")
    w = torch.randn(3, 7)
    y, _ = OPS.linear.cpu(x, w, None, "none", False)
    assert torch.isfinite(y).all(dim=1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_stand_where_torch_has_them(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, 6e4, -6e4, 1e-7]).to(dtype)
    y, kept = OPS.linear.cpu(z[:, None], torch.ones(1, 1, dtype=dtype), None, name, True)
    assert_equal(kept[:, 0], z, "preact")
    act = ACTIVATIONS[name]
    assert_close_to_truth(y[:, 0], act(z), act(z.double()), name="y")
    if name == "none":
        return
    leaf = z.clone().double().requires_grad_()
    plain_leaf = z.clone().requires_grad_()
    saved = y[:, 0] if name == "relu" else z
    for dy in (torch.ones_like(z), torch.full_like(z, float("inf"))):
        (truth,) = torch.autograd.grad(act(leaf), leaf, dy.double())
        (plain,) = torch.autograd.grad(act(plain_leaf), plain_leaf, dy)
        assert_close_to_truth(OPS.linear_dz.cpu(dy, saved, name), plain, truth, name="dz")


def half_values() -> Tensor:
    """Every finite fp16 value."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return every[torch.isfinite(every)]


def assert_correctly_rounded(actual: Tensor, truth: Tensor, z: Tensor, absolute: float = 0.0) -> None:
    """|actual - truth| <= 0.502 units in the last place of fp16 (+ absolute), element by element."""
    exponent = torch.frexp(truth.abs().clamp(min=2.0**-14)).exponent
    bound = 0.502 * torch.ldexp(torch.ones_like(truth), exponent - 11) + absolute
    error = (actual.double() - truth).abs()
    worst = int((error / bound).argmax())
    assert error[worst] <= bound[worst], (
        f"at z = {z[worst].item()!r}: {actual[worst].item()!r}, truth {truth[worst].item()!r}"
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_every_fp16_value(name: str) -> None:
    z = half_values()
    truth = ACTIVATIONS[name](z.double())
    one = torch.ones(1, 1).half()
    by_columns, _ = OPS.linear.cpu(one, z[:, None], None, name, False)
    by_rows, _ = OPS.linear.cpu(z[:, None], one, None, name, False)
    assert_correctly_rounded(by_columns[0], truth, z)
    assert_equal(by_rows[:, 0], by_columns[0], "one column against one row")


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_derivative_at_every_fp16_value(name: str) -> None:
    z = half_values()
    leaf = z.double().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[name](leaf).sum(), leaf)
    saved = F.relu(z) if name == "relu" else z
    dz = OPS.linear_dz.cpu(torch.ones_like(z), saved, name)
    assert_correctly_rounded(dz, truth, z, absolute=2e-7)  # fp32 rounding near the derivative's zero


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dz(name: str, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 7), (40, 33), (1,), (0, 4)):
        dy, z = torch.randn(shape).to(dtype), (4 * torch.randn(shape)).to(dtype)
        leaf, plain_leaf = z.double().requires_grad_(), z.clone().requires_grad_()
        (truth,) = torch.autograd.grad(ACTIVATIONS[name](leaf), leaf, dy.double())
        (plain,) = torch.autograd.grad(ACTIVATIONS[name](plain_leaf), plain_leaf, dy)
        saved = F.relu(z) if name == "relu" else z
        assert_close_to_truth(OPS.linear_dz.cpu(dy, saved, name), plain, truth)
        if len(shape) == 2:
            strided = OPS.linear_dz.cpu(variants(dy)["transposed"], variants(saved)["sliced"], name)
            assert_equal(strided, OPS.linear_dz.cpu(dy, saved, name), "dz of strided tensors")
            assert strided.is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_unscale(dtype: torch.dtype, accumulate: bool) -> None:
    for shape in ((1000, 37), (5,), (0,), ()):
        grad, start, found = torch.randn(shape).to(dtype), torch.randn(shape), scalar(0.0)
        main = start.clone() if accumulate else torch.full(shape, float("nan"))
        OPS.unscale_.cpu(grad, main, scalar(2.0**-7), found, accumulate)
        expected = grad.float() * 2.0**-7
        assert_equal(main, start + expected if accumulate else expected)
        assert found.item() == 0.0
    grad, main = torch.randn(6, 4).to(dtype), torch.zeros(4, 6).t()
    OPS.unscale_.cpu(grad.t().contiguous().t(), main, scalar(1.0), found, True)
    assert_equal(main, grad.float(), "a main gradient that is not contiguous")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, w, dz = torch.randn(90, 200).half(), torch.randn(300, 200).half(), torch.randn(90, 300).half()

    def run() -> list[Tensor]:
        main, found = torch.zeros(300, 200), scalar(0.0)
        OPS.linear_dw_.cpu(dz, x, main, scalar(1.0), found, False)
        return [*OPS.linear.cpu(x, w, None, "gelu", True), OPS.linear_dx.cpu(dz, w), main, OPS.linear_db.cpu(dz),
                OPS.grad_sqnorm.cpu([main, main]), OPS.pack.cpu(x, "int8")]  # fmt: skip

    torch.set_num_threads(1)
    single = run()
    torch.set_num_threads(3)
    for a, b in zip(run(), single):
        assert_equal(a, b, "three threads against one")


@pytest.mark.skipif(C.isa() == "amx", reason="tiles, whose sums have another order, serve from some rows on")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    """The panels of a product use as many rows as they can all have, by a micro-kernel for each number of rows."""
    torch.manual_seed(0)
    dz, w = torch.randn(43, 70).to(dtype), torch.randn(70, 40).to(dtype)
    whole = OPS.linear_dx.cpu(dz, w)
    assert_close_to_truth(whole, (dz.float() @ w.float()).to(dtype), dz.double() @ w.double(), name="all rows")
    for rows in range(1, 43):
        assert_equal(OPS.linear_dx.cpu(dz[:rows], w), whole[:rows])


def test_two_python_threads_at_once() -> None:
    x, w = torch.randn(64, 300), torch.randn(257, 300)
    expected = OPS.linear.cpu(x, w, None, "silu", True)
    wrong: list[str] = []

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            for a, b in zip(OPS.linear.cpu(x, w, None, "silu", True), expected):
                if not torch.equal(a, b):
                    wrong.append("differs")

    together(work, work)
    assert not wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.linear.cpu(torch.ones(2, 3), torch.ones(4, 5), None, "none", False), "3 features.*takes 5"),
        (lambda: OPS.linear.cpu(torch.ones(2, 5), torch.ones(4, 5).half(), None, "none", False), "float32.*float16"),
        (lambda: OPS.linear.cpu(torch.ones(2, 5), torch.ones(4, 5), torch.ones(5), "none", False), "bias"),
        (lambda: OPS.linear.cpu(torch.ones(2, 5), torch.ones(4, 5), None, "tanh", False), "unknown activation 'tanh'"),
        (lambda: OPS.linear.cpu(torch.ones(2, 5).double(), torch.ones(4, 5).double(), None, "none", False), "float64"),
        (lambda: OPS.linear_dx.cpu(torch.ones(2, 5), torch.ones(4, 5)), "does not fit"),
        (lambda: OPS.linear_dw.cpu(torch.ones(2, 5), torch.ones(3, 5)), "row counts"),
        (
            lambda: OPS.linear_dw_.cpu(
                torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 5).half(), scalar(1), scalar(0), False
            ),
            "main_grad must be float32",
        ),
        (
            lambda: OPS.linear_dw_.cpu(
                torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 5).t(), scalar(1), scalar(0), False
            ),
            "contiguous",
        ),
        (lambda: OPS.unscale_.cpu(torch.ones(2), torch.ones(3), scalar(1), scalar(0), False), r"\[2\].*\[3\]"),
        (lambda: OPS.pack.cpu(torch.ones(2), "fp4"), "unknown codec 'fp4'"),
        (lambda: OPS.pack.cpu(torch.ones(1, 1, 1, 1, 1, 1), "int8"), "6 dimensions"),
        (lambda: OPS.unpack.cpu(torch.zeros(10, dtype=torch.uint8), [2], torch.float32, "int8"), "got 10"),
        (lambda: OPS.grad_sqnorm.cpu([torch.ones(2).half()]), "must be float32"),
    ],
)
def test_direct_callers_get_the_values_in_the_message(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (3, 17), (16, 64), (35, 100), (70, 513)])
def test_a_row_has_its_own_bits_whatever_rows_and_columns_are_beside_it(
    columns: int, inner: int, dtype: torch.dtype
) -> None:
    """Products of up to four rows take columns four and sixteen at a time, and those that are left one by one."""
    torch.manual_seed(0)
    x, w = torch.randn(4, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    whole = OPS.linear.cpu(x, w, None, "none", False)[0]
    assert_close_to_truth(whole, F.linear(x, w), x.double() @ w.double().t())
    for i in range(4):
        assert_equal(OPS.linear.cpu(x[i : i + 1], w, None, "none", False)[0], whole[i : i + 1])
    last = OPS.linear.cpu(x, w[-1:].contiguous(), None, "none", False)[0]
    assert_equal(last, whole[:, -1:].contiguous())
