"""The C++ ops of the gated MLP and of the linear cross-entropy, by their overloads, against fp64 truth.

"Plain" is the reference backend in the same dtype. Runs on every instruction set, like test_cpu_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from test_cpu_kernels import DTYPES, OPS, variants
from torch import Tensor

# rows, in, hidden: single elements, odd lengths along k (a pair of bf16 is half empty), ragged against micro-tiles and
# tasks, two k ranges (above 2048 slots), empty in each dimension
SHAPES = [
    (1, 1, 1),
    (5, 3, 7),
    (33, 65, 17),
    (3, 70, 300),
    (29, 200, 130),
    (7, 2100, 35),
    (0, 4, 6),
    (4, 0, 6),
    (4, 6, 0),
]
CE_SHAPES = [(1, 1, 1), (5, 3, 7), (33, 65, 256), (29, 70, 771), (2, 24, 515), (7, 4200, 35), (0, 4, 6), (4, 0, 6)]


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype)


def largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def check(name: str, *arguments: object) -> None:
    """spu::name.cpu against spu::name.reference in the same dtype and in fp64."""
    double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    op = getattr(OPS, name)
    results = [op.cpu(*arguments), op.reference(*arguments), op.reference(*double)]
    if isinstance(results[0], Tensor):
        results = [(result,) for result in results]
    for i, (ours, plain, truth) in enumerate(zip(*results, strict=True)):
        assert ours.is_contiguous()
        # In few elements plain torch may be exact by luck; in fp32 an exponential and a division round more than once.
        eps = (1.5 if ours.dtype == torch.float32 else 0.5) * torch.finfo(ours.dtype).eps * largest(truth)
        assert_close_to_truth(ours, plain, truth, eps=eps, name=f"{name}[{i}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, hidden = shape
    x, w_gate, w_up = (values(n, inner, dtype=dtype) for n in (rows, hidden, hidden))
    gate, up, dh = (values(rows, hidden, dtype=dtype) * 3 for _ in range(3))
    for activation in ("silu", "gelu", "gelu_tanh"):
        check("gated_linear", x, w_gate, w_up, activation, True)
        check("gated_dz", dh, gate, up, activation)
        check("gated_dh", x, values(inner, hidden, dtype=dtype), gate, up, activation)
    check("gated_dx", gate, up, w_gate, w_up)
    check("gated_mlp", x, w_gate, w_up, values(5, hidden, dtype=dtype), "silu", True)
    kept = OPS.gated_linear.cpu(x, w_gate, w_up, "silu", True)
    alone = OPS.gated_linear.cpu(x, w_gate, w_up, "silu", False)
    assert_equal(alone[0], kept[0])
    assert alone[1].numel() == alone[2].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_strides(dtype: torch.dtype) -> None:
    x, w = values(11, 37, dtype=dtype), values(21, 37, dtype=dtype)
    d = values(11, 21, dtype=dtype)
    for name, other in variants(w).items():
        for x_name, rows in variants(x).items():
            check("gated_linear", rows, w, other, "silu", True)
            assert_equal(
                OPS.gated_linear.cpu(rows, other, w, "silu", False)[0],
                OPS.gated_linear.cpu(x, w, w, "silu", False)[0],
                f"x {x_name}, w {name}",
            )
        for wide in variants(d).values():
            check("gated_dx", wide, d, other, w)
            check("gated_dh", rows, other.t(), wide, d, "gelu")


def test_a_gate_without_a_limit() -> None:
    """The backward at the ends: silu's slope is 1 and 0 there, NaN at the infinities, as in torch."""
    gate = torch.tensor([-3e38, -1e4, -90.0, -88.0, -20.0, 0.0, 20.0, 90.0, 1e4, 3e38, float("nan")])
    one = torch.ones_like(gate)
    check("gated_dz", one, gate, one, "silu")
    for bad in (float("inf"), -float("inf"), float("nan")):
        assert OPS.gated_dz.cpu(one, torch.full_like(gate, bad), one, "silu")[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CE_SHAPES, ids=str)
def test_cross_entropy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, vocabulary = shape
    hidden, weight = values(rows, inner, dtype=dtype) * 8, values(vocabulary, inner, dtype=dtype)
    target = torch.randint(vocabulary, (rows,))
    target[::3] = -100
    check("linear_ce", hidden, weight, target, -100)
    lse = OPS.linear_ce.reference(hidden.double(), weight.double(), target, -100)[1].float()
    grads = torch.randn(rows)
    grads[::3] = float("inf")  # of ignored rows: never looked at
    check("linear_ce_dz", hidden, weight, target, lse, grads, -100)


def check_loss_and_gradient(hidden: Tensor, weight: Tensor, target: Tensor, grads: Tensor, name: str = "") -> None:
    """spu::linear_ce_and_dz_.cpu against the reference in the same dtype and in fp64; dz in the logits' memory too."""

    def made(backend: str, dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = torch.empty(len(hidden), len(weight), dtype=wide)
        dz = torch.empty_like(logits, dtype=dtype)
        op = getattr(OPS.linear_ce_and_dz_, backend)
        losses = op(hidden.to(dtype), weight.to(dtype), target, grads.to(wide), logits, dz, -100)
        if dtype == wide:
            again = op(hidden.to(dtype), weight.to(dtype), target, grads.to(wide), logits, logits, -100)
            assert_equal(again, losses, "losses in place")
            assert_equal(logits, dz, "dz in place")
        return losses, dz

    ours, plain = (made(backend, hidden.dtype, torch.float32) for backend in ("cpu", "reference"))
    truth = made("reference", torch.float64, torch.float64)
    for i, what in enumerate(("loss", "dz")):
        eps = (1.5 if ours[i].dtype == torch.float32 else 0.5) * torch.finfo(ours[i].dtype).eps * largest(truth[i])
        assert_close_to_truth(ours[i], plain[i], truth[i], eps=eps, name=f"{what} {name}")
        assert_equal(ours[i].isnan(), plain[i].isnan(), f"NaN of {what} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*CE_SHAPES, (3, 2, 20000)], ids=str)
def test_cross_entropy_and_its_gradient(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, vocabulary = shape
    hidden, weight = values(rows, inner, dtype=dtype) * 8, values(vocabulary, inner, dtype=dtype)
    target = torch.randint(vocabulary, (rows,))
    check_loss_and_gradient(hidden, weight, target, torch.randn(rows))
    target[::3] = -100
    grads = torch.randn(rows)
    grads[::3] = float("inf")  # of ignored rows: never looked at
    check_loss_and_gradient(hidden, weight, target, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_and_its_gradient_of_strided_operands(dtype: torch.dtype) -> None:
    hidden, weight, target = values(11, 37, dtype=dtype) * 6, values(70, 37, dtype=dtype), torch.randint(70, (11,))
    for name, rows in variants(hidden).items():
        for words in variants(weight).values():
            check_loss_and_gradient(rows, words, target, torch.rand(11), name)


def test_a_row_that_is_not_finite_has_no_gradient_but_nan() -> None:
    """And it leaves the others alone; one whose target does not count has the gradient 0 all the same."""
    inf, nan = float("inf"), float("nan")
    for bad in ([1.0, inf], [-inf, 2.0], [-inf, -inf], [nan, 1.0], [inf, nan], [-3e38, 3e38]):
        weight = torch.zeros(600, 2)  # the first column holds the logits of the first and the last row
        weight[:, 0], weight[0, 0], weight[:, 1] = bad[1], bad[0], torch.linspace(-9, 9, 600)
        hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        if not weight[:, 0].isfinite().all():  # 0 times them is NaN
            weight[:, 1] = 0
        check_loss_and_gradient(hidden, weight, torch.tensor([1, 5, -100]), torch.ones(3), str(bad))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cross_entropy_depends_on_no_thread_count(threads: int) -> None:
    torch.manual_seed(3)
    hidden, weight, target = torch.randn(70, 64).half(), torch.randn(1000, 64).half(), torch.randint(1000, (70,))
    torch.set_num_threads(1)
    once = OPS.linear_ce.cpu(hidden, weight, target, -100)
    torch.set_num_threads(threads)
    again = OPS.linear_ce.cpu(hidden, weight, target, -100)
    check_loss_and_gradient(hidden, weight, target, torch.rand(70))
    assert_equal(again[0], once[0])
    assert_equal(again[1], once[1])


def test_infinite_logits() -> None:
    """A row with an infinite logit has an infinite sum, one of -inf alone has -inf, a NaN stays one: as logsumexp."""
    inf, nan = float("inf"), float("nan")
    rows = [[1.0, inf], [-inf, 2.0], [-inf, -inf], [nan, 1.0], [inf, nan]]
    for row in rows:
        # one column each: the logits are the weights, far apart so that they fall into different groups
        weight = torch.full((600, 1), row[1])
        weight[0] = row[0]
        hidden = torch.ones(1, 1)
        lse = OPS.linear_ce.cpu(hidden, weight, torch.tensor([1]), -100)[1]
        expected = torch.logsumexp(F.linear(hidden, weight), 1)
        assert_close_to_truth(lse, expected, expected, eps=1e-5, name=str(row))
        assert bool(lse.isnan()) == bool(expected.isnan())


def test_a_group_of_minus_infinities_adds_nothing() -> None:
    """256 logits of -inf beside others below -745, which e^0 of the empty group would overflow."""
    weight = torch.full((512, 1), -1000.0)
    weight[:256] = float("-inf")
    lse = OPS.linear_ce.cpu(torch.ones(1, 1), weight, torch.tensor([300]), -100)[1]
    expected = torch.logsumexp(weight[:, 0], 0, keepdim=True)
    assert_close_to_truth(lse, expected, expected.double(), name="log sum exp")


def test_cross_entropy_of_many_rows() -> None:
    """More than one range of rows whose statistics are kept, from rows that lie apart."""
    hidden = torch.randn(4500, 6)[:, ::2].half()
    weight, target = torch.randn(19, 3).half(), torch.randint(19, (4500,))
    check("linear_ce", hidden, weight, target, -100)
    target[4321] = 19
    with pytest.raises(ValueError, match=r"target\[4321\] is 19, not 0 to 18 or -100"):
        OPS.linear_ce.cpu(hidden, weight, target, -100)


def test_direct_callers_are_told_what_does_not_fit() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="w_gate.*w_up"):
        OPS.gated_linear.cpu(x, w, torch.randn(6, 4), "silu", True)
    with pytest.raises(ValueError, match="silu, gelu or gelu_tanh, got 'relu'"):
        OPS.gated_linear.cpu(x, w, w, "relu", True)
    with pytest.raises(ValueError, match=r"target must be int64 \[3\]"):
        OPS.linear_ce.cpu(x, w, torch.zeros(2, dtype=torch.int64), -100)
    with pytest.raises(ValueError, match="lse must be contiguous with 3 values"):
        OPS.linear_ce_dz.cpu(x, w, torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(3), -100)
    logits, target, ones = torch.empty(3, 5), torch.tensor([0, 5, 1]), torch.ones(3)
    op = OPS.linear_ce_and_dz_.cpu
    with pytest.raises(ValueError, match=r"target\[1\] is 5, not 0 to 4 or -100"):
        op(x, w, target, ones, logits, logits, -100)
    with pytest.raises(ValueError, match=r"dz must be contiguous with 15 values, got shape \[5, 3\]"):
        op(x, w, target % 5, ones, logits, torch.empty(3, 5).t(), -100)
    with pytest.raises(ValueError, match="logits must be float32"):
        op(x.half(), w.half(), target % 5, ones, logits.half(), logits.half(), -100)
