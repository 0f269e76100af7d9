"""What the kernels on AMX tiles have of their own: exact splitting of fp16, non-finite values, blocks, the rule.

Runs where spu._C has chosen "amx"; test_cpu_isa.py runs it, and the files that test every instruction set, on emulated
tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from numeric import assert_close_to_truth, assert_equal
from test_cpu_kernels import OPS, scalar
from torch import Tensor

_C = sys.modules["spu._C"]
needs_tiles = pytest.mark.skipif(_C.isa() != "amx", reason="needs the tiles of AMX, real or emulated")
INF, NAN = float("inf"), float("nan")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def every_product_on_tiles() -> Iterator[None]:
    """Every size on tiles, also where the rule that ships would leave it to AVX-512."""
    torch.manual_seed(0)
    rules = {name: _C.tile_rule(name) for name in ("fp16", "bf16")}
    for name in rules:
        _C.set_tile_rule(name, 1, 1, 1)
    yield
    for name, rule in rules.items():
        _C.set_tile_rule(name, *rule)


def main_grad(dz: Tensor, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, float]:
    """dz.T @ x, or that added to start, and found_inf."""
    grad = torch.empty(dz.shape[1], x.shape[1]) if start is None else start.clone()
    found = scalar(0.0)
    OPS.linear_dw_.cpu(dz, x, grad, scalar(1.0), found, start is not None)
    return grad, found.item()


def linear(x: Tensor, w: Tensor) -> Tensor:
    return OPS.linear.cpu(x, w, None, "none", False)[0]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def magnitudes(*shape: int, low: float, high: float) -> Tensor:
    """Signed fp16 values whose magnitudes are spread evenly over the decades from 10**low to 10**high."""
    return (torch.randn(shape).sign() * 10 ** (torch.rand(shape) * (high - low) + low)).half()


@needs_tiles
def test_every_fp16_value_is_the_sum_of_its_parts() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite, one = every[torch.isfinite(every)], torch.ones(1, 1).half()
    assert_equal(linear(finite[:, None], one)[:, 0], finite, "rounded to fp16")
    assert_equal(main_grad(finite[None], one)[0][:, 0], finite.float(), "left operand, fp32")
    assert_equal(main_grad(one, finite[None])[0][0], finite.float(), "right operand, fp32")
    assert_equal(linear(every[:, None], one)[:, 0], every, "with infinities and NaNs")
    # A product of two fp16 values has 22 bits: four products of parts have fp32's rounding, three lack lo * lo.
    factors = torch.tensor([1.0, 1.0009765625, -1.9990234375, 2.0**-24, 65504.0, 333.25]).half()
    truth = finite.double()[:, None] * factors.double()
    error = (main_grad(finite[None], factors[None])[0].double() - truth).abs()
    assert bool((error <= truth.abs() * 2.0**-23).all())


@needs_tiles
@pytest.mark.parametrize(("low", "high"), [(-7.0, 4.0), (-7.0, -4.0), (-8.0, -7.0)])
def test_the_error_of_loss_scaled_gradients_is_not_above_torchs(low: float, high: float) -> None:
    dz, x = magnitudes(500, 90, low=low, high=high), torch.nn.functional.gelu(torch.randn(500, 130)).half()
    truth = dz.double().T @ x.double()
    ours = rms(main_grad(dz, x)[0] - truth)
    assert ours <= 0.1 * rms((dz.T @ x).double() - truth)
    assert ours <= 1.25 * rms(dz.float().T @ x.float() - truth)  # four products: fp32's own rounding
    w = (torch.randn(90, 130) / 10).half()
    truth = dz.double() @ w.double()
    ours, plain = (y.double() - truth for y in (OPS.linear_dx.cpu(dz, w), dz @ w))
    finite = torch.isfinite(plain) & torch.isfinite(ours)
    assert rms(ours[finite]) <= 1.001 * rms(plain[finite])  # both are the rounding of the result


@needs_tiles
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("rows", "out", "inner"),
    [(40, 600, 1700), (300, 70, 1700), (3, 300, 16500), (520, 20, 16400), (32, 40, 16512)],
    ids=["blocks of k and of columns", "of rows", "ranges of k", "ranges of k and of rows", "of k in place"],
)
def test_blocks(rows: int, out: int, inner: int, dtype: torch.dtype) -> None:
    if rows == 520 and dtype == torch.bfloat16:
        pytest.skip("a block of bf16 has twice the rows")
    x, w = torch.randn(rows, inner).to(dtype), (torch.randn(out, inner) / inner**0.5).to(dtype)
    truth = x.double() @ w.double().T
    assert_close_to_truth(linear(x, w), x @ w.T, truth)
    grad, found = main_grad(x.T.contiguous(), w.T)
    assert_close_to_truth(grad, x.float() @ w.float().T, truth)
    assert found == 0.0
    start = torch.randn(rows, out)
    assert_equal(main_grad(x.T, w.T.contiguous(), start)[0], start + grad, "added to main_grad")


@needs_tiles
@pytest.mark.parametrize("inner", [96, 1024], ids=["few sets of L1", "one set"])
@pytest.mark.parametrize(("start", "apart"), [(0, 0), (0, 32), (1, 0), (32, 7)], ids=str)
def test_rows_are_the_same_wherever_they_lie(inner: int, start: int, apart: int) -> None:
    """bf16 rows of whole cache lines are read from where they lie; others, and a last part of a panel, are packed."""
    x, w = torch.randn(96, inner).bfloat16(), torch.randn(40, inner).bfloat16()
    here = torch.full((96, start + inner + apart), NAN, dtype=torch.bfloat16)[:, start : start + inner]
    here.copy_(x)
    assert_equal(linear(here, w), linear(x, w))
    assert_equal(linear(here[:80], w), linear(x, w)[:80])
    assert_close_to_truth(linear(x, w), x @ w.T, x.double() @ w.double().T)


@needs_tiles
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chains_twins_and_statistics_in_ranges_of_k(dtype: torch.dtype) -> None:
    rows, hidden, wide = 3, 4, 16500
    x, gate, up = (torch.randn(n, wide).to(dtype) / wide**0.5 for n in (rows, hidden, hidden))
    for ours, plain in zip(
        OPS.gated_linear.cpu(x, gate, up, "silu", True), OPS.gated_linear.reference(x, gate, up, "silu", True)
    ):
        assert_close_to_truth(ours, plain, plain.double(), name="gated_linear")
    d, other = torch.randn(rows, wide).to(dtype), torch.randn(rows, wide).to(dtype)
    into = torch.randn(wide, hidden).to(dtype) / wide**0.5
    truth = d.double() @ into.double() + other.double() @ into.flip(0).double()
    dx = OPS.gated_dx.cpu(d, other, into, into.flip(0))
    assert_close_to_truth(dx, (d.float() @ into.float() + other.float() @ into.flip(0).float()).to(dtype), truth)
    target = torch.randint(260, (rows,))
    weight = torch.randn(260, wide).to(dtype) / wide**0.5
    loss, lse = OPS.linear_ce.cpu(x * 100, weight, target, -100)
    true_loss, true_lse = OPS.linear_ce.reference((x * 100).double(), weight.double(), target, -100)
    torch.testing.assert_close(loss.double(), true_loss.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), true_lse.double(), rtol=1e-6, atol=1e-6)


@needs_tiles
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_non_finite_values_stand_where_they_belong(dtype: torch.dtype, bad: float) -> None:
    x, w = torch.randn(70, 100).to(dtype), torch.randn(600, 100).to(dtype)
    x[:, 50], w[:, 50] = x[:, 50].abs() + 1, w[:, 50].abs() + 1  # of one sign: an infinity stays one
    clean = linear(x, w)
    for at in ((33, 50), (0, 0)):  # 0, 0: also against zeros
        rows, columns = x.clone(), w.clone()
        rows[at], columns[300 + at[0], at[1]] = bad, bad
        w[5:9, 0] = x[5:9, 0] = 0
        for name, a, b in (("left", rows, w), ("right", x, columns), ("both", rows, columns)):
            y, plain = linear(a, b), a.float() @ b.float().T
            infinite = torch.isinf(plain)
            assert_equal(y.isnan(), plain.isnan(), f"NaNs, {name}")
            assert_equal(y[infinite].float(), plain[infinite], f"infinities, {name}")
            assert_close_to_truth(y, plain.to(dtype), a.double() @ b.double().T, name=name)
            start = torch.randn(70, 600)
            grad, found = main_grad(a.T.contiguous(), b.T, start)
            assert found == 1.0
            assert_equal(grad.isfinite(), plain.isfinite(), f"main_grad, {name}")
            assert_close_to_truth(grad, start + plain, start.double() + a.double() @ b.double().T, name=f"grad, {name}")
    columns = w.clone()
    columns[300, 50] = bad  # in the second group of 256 columns: the others are the tiles' as before
    y = linear(x, columns)
    kept = torch.cat((torch.arange(9, 256), torch.arange(512, 600)))
    assert_equal(y[9:, kept], clean[9:, kept], "the other groups")


@needs_tiles
def test_a_value_that_is_not_finite_leaves_other_panels_of_rows_on_tiles() -> None:
    x, w = torch.randn(400, 512).half(), torch.randn(300, 512).half()
    clean, grad = linear(x, w), main_grad(w.T.contiguous(), x.T)[0]  # grad: rows are w's
    x[200, 50] = INF  # in the panel of rows 192 to 223, and in the second part of the rows that is packed
    others = torch.cat((torch.arange(192), torch.arange(224, 400)))
    assert_equal(linear(x, w)[others], clean[others], "rows of the left operand")
    assert not bool(linear(x, w)[200].isfinite().any())
    w[40, 9] = NAN
    columns = torch.cat((torch.arange(32), torch.arange(64, 300)))
    again, found = main_grad(w.T.contiguous(), x.nan_to_num(0.0, posinf=0.0).T)
    assert found == 1.0
    assert not bool(again[40].isfinite().any())
    assert_equal(again[columns][:, others], grad[columns][:, others], "rows of a main gradient")


@needs_tiles
def test_non_finite_values_of_twins_chains_and_logits() -> None:
    x, gate, up = torch.randn(40, 70).half(), torch.randn(300, 70).half(), torch.randn(300, 70).half()
    up[270, 3] = INF
    h, z, u = OPS.gated_linear.cpu(x, gate, up, "silu", True)
    plain = OPS.gated_linear.reference(x, gate, up, "silu", True)
    for ours, theirs in zip((h, z, u), plain):
        assert_equal(ours.isfinite(), theirs.isfinite())
    d, other = torch.randn(40, 300).half(), torch.randn(40, 300).half()
    other[7, 11] = NAN
    dx = OPS.gated_dx.cpu(d, other, gate, up)
    assert_equal(dx.isfinite(), OPS.gated_dx.reference(d, other, gate, up).isfinite())
    target = torch.randint(300, (40,))
    target[:2] = torch.tensor([-100, 280])
    loss, lse = OPS.linear_ce.cpu(x, up, target, -100)  # logits of inf and -inf
    true_lse = OPS.linear_ce.reference(x.float(), up.float(), target, -100)[1]
    assert_equal(lse.isfinite(), true_lse.isfinite())
    torch.testing.assert_close(lse, true_lse, rtol=1e-6, atol=0)
    up[270, 3] = 1
    x[5, 60] = -INF
    loss, lse = OPS.linear_ce.cpu(x, up, target, -100)
    true_loss, true_lse = OPS.linear_ce.reference(x.float(), up.float(), target, -100)
    assert_equal(lse.isfinite(), true_lse.isfinite())
    torch.testing.assert_close(loss[6:], true_loss[6:].float(), rtol=1e-5, atol=1e-5)


@needs_tiles
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_attention_of_values_that_are_not_finite(bad: float) -> None:
    """Later keys and other queries change no bit; who meets them gets what fp32 arithmetic gives."""
    clean = [torch.randn(1, 80, 2, 24).half() for _ in range(3)]
    before = OPS.attention.cpu(*clean, 0.2, True)
    for which, name in enumerate(("q", "k", "v")):
        operands = [t.clone() for t in clean]
        operands[which][0, 70, 1, 5] = bad
        out, lse = OPS.attention.cpu(*operands, 0.2, True)
        true_out, true_lse = OPS.attention.reference(*[t.float() for t in operands], 0.2, True)
        seen = 70 if name != "v" else 64  # a panel of queries multiplies all its keys' values, by 0 where unseen
        assert_equal(out[:, :seen], before[0][:, :seen], f"{name}: queries before")
        assert_equal(out[:, :, 0], before[0][:, :, 0], f"{name}: the other head")
        assert_equal(out[:, 70:].isfinite(), true_out[:, 70:].isfinite(), f"{name}: queries from there on")
        assert_equal(lse.isfinite(), true_lse.isfinite(), f"{name}: lse")
        finite = out.isfinite() & true_out.isfinite()
        torch.testing.assert_close(out[finite].float(), true_out[finite], rtol=2e-3, atol=1e-3)


@needs_tiles
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("which", range(4), ids=["dout", "q", "k", "v"])
def test_attentions_gradients_of_values_that_are_not_finite(which: int, dtype: torch.dtype) -> None:
    operands = [torch.randn(1, 80, 2, 24).to(dtype) for _ in range(4)]
    dout, q, k, v = operands
    saved = OPS.attention.cpu(q, k, v, 0.2, True)
    gradients = OPS.attention_backward.cpu(dout, q, k, v, *saved, 0.2, True)
    operands[which][0, 70, 1, 5] = INF
    again = OPS.attention_backward.cpu(dout, q, k, v, *saved, 0.2, True)
    assert not all(bool(g.isfinite().all()) for g in again)  # it is found
    for ours, first in zip(again, gradients, strict=True):
        assert_equal(ours[:, :, 0], first[:, :, 0], "the other head")


@needs_tiles
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_epilogue_of_an_mlps_gradient(activation: str, dtype: torch.dtype) -> None:
    dy, w, saved = torch.randn(70, 40).to(dtype), torch.randn(40, 300).to(dtype), torch.randn(70, 300).to(dtype)
    ours = OPS.mlp_dz.cpu(dy, w, saved, activation, True, True)
    plain = OPS.mlp_dz.reference(dy, w, saved, activation, True, True)
    truth = OPS.mlp_dz.reference(dy.double(), w.double(), saved.double(), activation, True, True)
    for name, one, two, true in zip(("dz", "h"), ours, plain, truth):
        assert_close_to_truth(one, two, true, name=name)
    torch.testing.assert_close(ours[2].double(), ours[0].double().sum(0), rtol=1e-5, atol=1e-5)
    w[3, 280] = dy[40, 1] = INF
    dz, h, sums = OPS.mlp_dz.cpu(dy, w, saved, activation, True, True)
    assert_equal(h, ours[1], "h")
    assert_equal(dz.isfinite(), OPS.mlp_dz.reference(dy, w, saved, activation, True, True)[0].isfinite())
    assert_equal(sums.isfinite(), dz.isfinite().all(0), "sums")


@needs_tiles
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_epilogue_of_a_gates_gradient(dtype: torch.dtype) -> None:
    dy, w = torch.randn(70, 40).to(dtype), torch.randn(40, 300).to(dtype)
    gate, up = torch.randn(70, 300).to(dtype), torch.randn(70, 300).to(dtype)
    given = dy, w, gate, up
    truth = OPS.gated_dh.reference(*(t.double() for t in given), "silu")
    for ours, plain, true in zip(
        OPS.gated_dh.cpu(*given, "silu"), OPS.gated_dh.reference(*given, "silu"), truth, strict=True
    ):
        assert_close_to_truth(ours, plain, true)


@needs_tiles
def test_bf16_denormals_count_as_zero_and_fp16_ones_do_not() -> None:
    tiny = torch.tensor([[2.0**-127, -(2.0**-133), 2.0**-126, 1.0]]).bfloat16()
    one = torch.ones(1, 1).bfloat16()
    assert_equal(main_grad(tiny, one)[0][:, 0], torch.tensor([0.0, 0.0, 2.0**-126, 1.0]))
    small = torch.tensor([[2.0**-24, -(2.0**-20), 3 * 2.0**-24]]).half()
    assert_equal(main_grad(small, torch.ones(1, 1).half())[0][:, 0], small[0].float())


@needs_tiles
def test_the_rule_says_which_products_are_the_tiles() -> None:
    denormal, ones = torch.full((20, 33), 2.0**-130).bfloat16(), torch.ones(20, 40).bfloat16()  # k 20; C [33, 40]

    def on_tiles() -> bool:
        return main_grad(denormal, ones)[0].abs().max().item() == 0.0

    assert on_tiles()
    for rule, expected in {
        (33, 40, 20): True, (34, 1, 1): False, (1, 41, 1): False, (1, 1, 21): False, (1 << 62, 1, 1): False
    }.items():  # fmt: skip
        _C.set_tile_rule("bf16", *rule)
        assert _C.tile_rule("bf16") == rule
        assert on_tiles() is expected, rule


@needs_tiles
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    # The last two: a thread by itself packs all columns and then some rows at a time.
    shapes = [(150, 300, 130), (530, 40, 200), (33, 40, 3000), (33, 560, 1600), (300, 320, 512), (300, 320, 512)]
    operands = [(torch.randn(m, k).half(), (torch.randn(n, k) / k**0.5).half()) for m, n, k in shapes]
    operands[0][1][270, 5] = operands[4][0][140, 7] = operands[4][1][270, 5] = INF
    targets = [torch.randint(len(w), (len(x),)) for x, w in operands]

    def run() -> list[Tensor]:
        results = []
        for (x, w), target in zip(operands, targets):
            results += [linear(x, w), linear(x.bfloat16(), w.bfloat16()), main_grad(x.T, w.T)[0]]
            results += OPS.gated_linear.cpu(x, w, w, "silu", True)
            results += OPS.linear_ce.cpu(x, w, target, -100)
            results += OPS.mlp_dz.cpu(x, w.T, torch.ones(len(x), len(w)).half(), "gelu", True, True)
        return results

    torch.set_num_threads(1)
    single = run()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for a, b in zip(run(), single, strict=True):
            assert_equal(a, b, f"{threads} threads against one")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.tile_rule("fp32"), "bf16 and fp16, not fp32"),
        (lambda: _C.set_tile_rule("fp64", 1, 1, 1), "bf16 and fp16, not fp64"),
        (lambda: _C.set_tile_rule("fp16", 16, 0, 16), r"positive, got \(16, 0, 16\)"),
    ],
)
def test_a_wrong_rule_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
