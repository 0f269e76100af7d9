"""Products in every kind of launch and every configuration of the tables, against fp64; run interpreted.

Cases of test_triton_kernels.py, run by it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from thorough import ALL
from torch import Tensor

from spu import kernels
from spu.kernels import cross_entropy, derive, finish, gated
from spu.kernels.config import KINDS, Config
from spu.kernels.launch import for_alignment
from spu.ops.reference import fused as reference_fused

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(40, 67, 70), (5, 1, 3)]  # rows, out, in
# A dtype changes loads, stores and the multiplication, which all kinds but the descriptors' share.
CASES = [(kind, torch.float16, shape) for kind in KINDS for shape in SHAPES]
CASES += [(kind, dtype, (33, 65, 37)) for kind, dtype in (("split", torch.bfloat16), ("descriptor", torch.bfloat16))]
CASES += [("persistent", torch.float32, (33, 65, 37)), ("torch", torch.bfloat16, (33, 65, 37))]


def config(kind: str, **changes: int) -> Config:
    return dataclasses.replace(Config(kind, 32, 64, 32, 2, 4, 2, 3 if kind == "split" else 1), **changes)


def derived() -> list[object]:
    """Every configuration of the derived tables, each with the ops that use it (warps and stages change no result).

    What runs the same kernel in the same form is tried once: linear_dx is linear without an epilogue, and linear_dz_dx
    in any kind but "tile" is linear_dx. Of the rest, smaller tiles first, those that bring an op or a tile to a kind:
    the tile is how often a loop runs, which no op knows of. All of them: `make test-all`.
    """
    found: dict[tuple[str, Config], None] = {}
    for arch in derive.ARCHITECTURES:
        for key, entry in derive.table(arch).entries.items():
            op, one = key.split("/")[0], entry.config
            op = "linear" if op == "linear_dx" or (op == "linear_dz_dx" and one.kind != "tile") else op
            found[op, dataclasses.replace(one, group_m=2, num_warps=4, num_stages=2)] = None
    kept, met = [], set[tuple[object, ...]]()
    for op, one in sorted(found, key=lambda case: case[1].block_m * case[1].block_n * case[1].block_k):
        brought = {(op, one.kind), (one.kind, one.block_m, one.block_n, one.block_k)} - met
        met |= brought
        if brought or ALL:
            kept.append(pytest.param(op, one, id=f"{op}-{one.kind}-{one.block_m}x{one.block_n}x{one.block_k}"))
    return kept


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, out, inner = shape
    x, w = torch.randn(rows, inner), torch.randn(out, inner) / inner**0.5
    return x.to(dtype), w.to(dtype), torch.randn(out).to(dtype), torch.randn(rows, out).to(dtype)


def close(actual: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    eps = torch.finfo(actual.dtype).eps * float(truth.abs().max())  # rounding of its own, in other places than torch's
    assert_close_to_truth(actual, plain, truth, eps=eps, name=name)


def check_forward(x: Tensor, w: Tensor, b: Tensor, one: Config) -> None:
    y, z = kernels.linear_fwd(x, w, b, "gelu", True, config=one)
    truth = F.linear(x.double(), w.double(), b.double())
    close(z, F.linear(x, w, b), truth, f"z {one}")
    close(y, F.gelu(F.linear(x, w, b)), F.gelu(truth), f"y {one}")


def check_dw(dz: Tensor, x: Tensor, one: Config) -> None:
    main, bias = torch.full((dz.shape[1], x.shape[1]), float("nan")), torch.full((dz.shape[1],), float("nan"))
    inv, found = torch.tensor([2.0**-10]), torch.zeros(1)
    truth, bias_truth = dz.double().t() @ x.double() / 1024, dz.double().sum(0) / 1024
    plain, bias_plain = dz.float().t() @ x.float() / 1024, dz.float().sum(0) / 1024
    for times, accumulate in ((1, False), (2, True)):
        kernels.linear_dw_(dz, x, main, inv, found, accumulate, bias, config=one)
        close(main, times * plain, times * truth, f"main_grad x{times} {one}")
        close(bias, times * bias_plain, times * bias_truth, f"bias_grad x{times} {one}")
    assert found.item() == 0


@pytest.mark.parametrize(("kind", "dtype", "shape"), CASES)
def test_kinds(kind: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, w, b, dz = operands(shape, dtype)
    one = config(kind)
    check_forward(x, w, b, one)
    check_dw(dz, x, one)
    close(kernels.linear_dx(dz, w, config=one), dz @ w, dz.double() @ w.double(), f"dx {one}")
    close(kernels.linear_dw(dz, x, config=one), dz.t() @ x, dz.double().t() @ x.double(), f"dw {one}")


@pytest.mark.parametrize("kind", ["tile", "descriptor", "torch"])  # the others load as "tile" does
def test_strided_operands(kind: str) -> None:
    x, w, b, dz = operands((33, 40, 33), torch.float16)
    check_forward(x.t().contiguous().t(), w.repeat_interleave(3, 0)[::3], b, config(kind))
    check_forward(x.repeat_interleave(2, 1)[:, ::2], w.t().contiguous().t(), b, config(kind))
    check_dw(dz.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], config(kind))


@pytest.mark.parametrize(("op", "one"), derived())
def test_derived_configurations(op: str, one: Config) -> None:
    """One ragged tile, with enough inside to split; many tiles are test_kinds'."""
    if one.kind == "torch":
        shape = (20, 30, 40)
    else:
        shape = (one.block_m - 3, one.block_n - 5, one.block_k * (1 + one.split_k) + 7)
    x, w, b, _ = operands(shape, torch.float16)
    if op == "linear":
        check_forward(x, w, b, one)
    elif op == "linear_dz_dx":
        check_derivative_on_load(x, w.t(), one, "gelu")
    elif op == "linear_dw":
        check_dw(x.t(), w.t(), one)
    elif op == "gated_linear":
        check_gated(x, w, one)
    elif op == "gated_dh":
        check_gated_dh(x, w.t(), one)
    elif op == "gated_dx":
        truth = 2 * (x.double() @ w.double().t())
        close(kernels.gated_dx(x, x, w.t(), w.t(), config=one), x @ w.t() + x @ w.t(), truth, f"gated_dx {one}")
    elif op == "mlp_dz":
        check_mlp_dz(x, w.t(), one)
    else:
        assert op == "linear_ce"
        check_cross_entropy(x, w, one)


def check_mlp_dz(dy: Tensor, w_out: Tensor, one: Config) -> None:
    saved = torch.randn(dy.shape[0], w_out.shape[1]).to(dy.dtype)
    truth = reference_fused.mlp_dz(dy.double(), w_out.double(), saved.double(), "gelu", True, True)
    z = saved.float().requires_grad_()
    (dz,) = torch.autograd.grad(F.gelu(z), z, (dy @ w_out).float())
    dz = dz.to(dy.dtype)
    plain = dz, F.gelu(saved), dz.float().sum(0)
    for name, made, usual, right in zip(
        ("dz", "h", "sums"), kernels.mlp_dz(dy, w_out, saved, "gelu", True, True, one), plain, truth
    ):
        close(made, usual, right, f"{name} of mlp_dz {one}")


def check_derivative_on_load(dy: Tensor, w: Tensor, one: Config, activation: str) -> None:
    saved = torch.randn(dy.shape).to(dy.dtype)
    dz, dx = kernels.linear_dz_dx(dy, saved, w, activation, config=one)
    expected = kernels.linear_dz(dy, saved, activation)
    assert_equal(dz, expected, "dz")
    close(dx, expected @ w, expected.double() @ w.double(), f"dx {one}")


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("kind", ["tile", "torch"])
def test_derivative_on_load(kind: str, activation: str) -> None:
    _, w, _, dy = operands((45, 70, 35), torch.bfloat16)
    check_derivative_on_load(dy, w, config(kind), activation)


def check_gated(x: Tensor, w: Tensor, one: Config) -> None:
    up = w.flip(0)
    made = kernels.gated_linear(x, w, up, "silu", config=one)
    gate_truth, up_truth = x.double() @ w.double().t(), x.double() @ up.double().t()
    truths = (F.silu(gate_truth) * up_truth, gate_truth, up_truth)
    gate_plain, up_plain = F.linear(x, w), F.linear(x, up)
    for actual, plain, truth in zip(made, (F.silu(gate_plain) * up_plain, gate_plain, up_plain), truths):
        close(actual, plain, truth, f"gated {one}")


def check_gated_dh(dy: Tensor, w_down: Tensor, one: Config) -> None:
    gate, up = (torch.randn(dy.shape[0], w_down.shape[1]).to(dy.dtype) for _ in range(2))
    made = kernels.gated_dh(dy, w_down, gate, up, "silu", config=one)
    truth = reference_fused.gated_dz(dy.double() @ w_down.double(), gate.double(), up.double(), "silu")
    plain = reference_fused.gated_dz(dy @ w_down, gate, up, "silu")
    for name, a, p, t in zip(("dgate", "dup", "h"), made, plain, truth):
        close(a, p, t, f"{name} {one}")


def check_cross_entropy(h: Tensor, w: Tensor, one: Config) -> None:
    target = torch.randint(0, w.shape[0], (h.shape[0],))
    target[1] = -100
    loss, lse = kernels.linear_ce(h, w, target, -100, config=one)
    logits = h.double() @ w.double().t()
    expected = F.cross_entropy(logits, target, reduction="none")
    # cuBLAS's logits are rounded to 16 bits, as plain torch's are
    bound = 2 * torch.finfo(h.dtype).eps * float(logits.abs().max()) if one.kind == "torch" else 1e-4
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), rtol=0, atol=bound)
    assert loss[1] == 0
    scale = torch.linspace(1, 2, len(loss)) * 64
    dz = kernels.linear_ce_dz(h, w, target, lse, scale, -100, config=one)
    truth = (logits.softmax(1) - F.one_hot(target.clamp(min=0), w.shape[0])) * scale[:, None]
    truth[1] = 0
    torch.testing.assert_close(dz.double(), truth, rtol=0, atol=128 * (bound + torch.finfo(h.dtype).eps))
    assert not dz[1].any()
    both = kernels.linear_ce_and_dz(h, w, target, scale, torch.empty(logits.shape), -100, config=one)
    torch.testing.assert_close(both[0].double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(both[1].double(), truth, rtol=0, atol=128 * (bound + torch.finfo(h.dtype).eps))
    assert not both[1][1].any()


def test_fused_products_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged tiles of both orders of memory, wide enough for halves of halves."""
    used: list[str] = []
    for module in (gated, cross_entropy):
        allowed, name = module.descriptors_allowed, module.__name__
        monkeypatch.setattr(module, "descriptors_allowed", lambda a=allowed, n=name: (used.append(n), a())[1])
    one = config("descriptor", block_m=16, block_n=128, block_k=32, blocks=2)
    x, w = torch.randn(24, 40).half(), (torch.randn(136, 40) / 8).half()
    check_gated(x, w, one)
    check_gated_dh(x, w.t(), one)
    d = torch.randn(24, 136).half()
    truth = 2 * (d.double() @ w.double())
    close(kernels.gated_dx(d, d, w, w, config=one), d @ w + d @ w, truth, "dx")
    check_cross_entropy(x, w, one)
    check_cross_entropy(x.t().contiguous().t(), w.t().contiguous().t(), one)
    assert len(used) == 3 + 6, used
    narrow, weight = x[:3, :37].contiguous(), w[:9, :37].contiguous()
    check_gated(narrow, weight, one)  # rows of no multiple of 16 bytes are loaded by address
    check_cross_entropy(narrow, weight, one)
    assert len(used) == 3 + 6, used


@pytest.mark.parametrize("kind", ["persistent", "split"])  # those whose programs share tiles or sums
def test_split_and_all_others_repeat_their_bits(kind: str) -> None:
    x, _, _, dz = operands((100, 33, 65), torch.float16)
    results = []
    for _ in range(2):
        main, bias = torch.empty(33, 65), torch.empty(33)
        kernels.linear_dw_(dz, x, main, torch.ones(1), torch.zeros(1), False, bias, config=config(kind))
        results.append((main, bias))
    assert_equal(results[0][0], results[1][0], "main_grad")
    assert_equal(results[0][1], results[1][1], "bias_grad")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_overflow_is_found_in_every_kind(kind: str, value: float) -> None:
    x, _, _, dz = operands((80, 40, 48), torch.float16)
    dz[77, 39] = value
    main, bias, found = torch.empty(40, 48), torch.empty(40), torch.zeros(1)
    kernels.linear_dw_(dz, x, main, torch.ones(1), found, False, bias, config=config(kind))
    assert found.item() == 1
    assert not main[39].isfinite().any()
    assert not bias[39].isfinite()
    assert main[:39].isfinite().all()
    assert bias[:39].isfinite().all()


def test_offsets_beyond_32_bits_are_taken_in_64() -> None:
    """Strides whose reach within a tile leaves 32 bits: here through a view whose one row stride is huge and unused."""
    from spu.kernels.multiply import Form, plan

    device = torch.device("cpu")
    narrow = plan("linear", torch.float16, device, (8, 8, 8), (1000, 1, 1, 1000), True, Form(), None)
    wide = plan("linear", torch.float16, device, (8, 8, 8), (1 << 26, 1, 1, 1000), True, Form(), None)
    assert not narrow.constants["WIDE"]
    assert wide.constants["WIDE"]
    x = torch.randn(1, 40).as_strided((1, 40), (1 << 26, 1))
    w = torch.randn(9, 40)
    close(kernels.linear_fwd(x, w)[0], x @ w.t(), x.double() @ w.double().t(), "wide")


def test_rows_that_are_not_aligned_get_a_tile_whose_addresses_fit_the_registers() -> None:
    large = Config("descriptor", 128, 256, 64, 8, 8, 4)
    assert for_alignment(large, torch.float16, (1024, 1, 1, 64)) is large
    for strides in ((1021, 1, 1, 64), (1024, 1, 1, 4)):
        small = for_alignment(large, torch.float16, strides)
        assert (small.kind, small.block_m, small.block_n, small.block_k) == ("tile", 64, 64, 32)
    assert for_alignment(Config("split", split_k=4), torch.float32, (3, 1)).split_k == 4
    assert for_alignment(Config("torch"), torch.float16, (3, 1)).kind == "torch"


def test_products_by_torch_keep_leading_dimensions() -> None:
    """Without an epilogue torch writes the result itself: into [2, 5, N], not over its shape."""
    x, w = torch.randn(2, 5, 12).half(), torch.randn(6, 12).half()
    y, _ = kernels.linear_fwd(x, w, config=Config("torch"))
    dx = kernels.linear_dx(y, w, config=Config("torch"))
    assert (y.shape, dx.shape) == ((2, 5, 6), (2, 5, 12))
    close(y, x @ w.t(), x.double() @ w.double().t(), "y")
    close(dx, y @ w, y.double() @ w.double(), "dx")


def test_sums_in_fp32_by_torch_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before sm_80 all products are torch's: a weight gradient in fp32 was made whole, beside the main gradient. And
    the two input gradients of a gated layer were one product, of a copy of both weights.
    """
    x, w, _, dz = operands((24, 40, 32), torch.float16)
    up = w.flip(0).contiguous()
    results: list[Tensor] = []
    for limit in (finish.WIDE_BYTES, 4 * 32 * 16):  # all at once; rows by sixteens
        made: list[int] = []
        monkeypatch.setattr(finish, "WIDE_BYTES", limit)
        with monkeypatch.context() as patch:
            mm = torch.mm
            patch.setattr(torch, "mm", lambda a, b, out=None, mm=mm, made=made: made.append(a.shape[0]) or mm(a, b))
            patch.setattr(torch, "cat", None)
            check_dw(dz, x, Config("torch"))
            dx = kernels.gated_dx(dz, dz.flip(1), w, up, config=Config("torch"))
        assert made == ([40, 40, 24, 24] if limit > 1 << 20 else [16, 16, 8] * 2 + [16, 16, 8, 8])
        wide = dz.double() @ w.double() + dz.flip(1).double() @ up.double()
        close(dx, torch.cat((dz, dz.flip(1)), 1) @ torch.cat((w, up)), wide, "dx")
        results.append(dx)
    assert_equal(*results)


def test_a_persistent_grid_has_the_blocks_that_fit() -> None:
    from spu.kernels.launch import options, persistent_programs, programs_at_once

    device, one = torch.device("cpu"), Config("descriptor", 128, 128, 64, 8, 8, 3, blocks=2)
    assert persistent_programs(1000, one, device) == 2 * programs_at_once(device)
    assert persistent_programs(1, one, device) == 1
    assert options(one, torch.float16)["maxnreg"] == 128  # of 65536: two blocks of 256 threads
    assert "maxnreg" not in options(dataclasses.replace(one, num_warps=4), torch.float16)  # all 255 fit
    assert "maxnreg" not in options(dataclasses.replace(one, blocks=1), torch.float16)
    with pytest.raises(ValueError, match="blocks is 0"):
        dataclasses.replace(one, blocks=0)


def test_loops_are_made_one_but_for_bias_sums() -> None:
    from spu.kernels.multiply import Form, plan

    device, shape, strides = torch.device("cpu"), (64, 64, 64), (64, 1, 1, 64)

    def flat(one: Config, form: Form) -> object:
        return plan("linear_dw", torch.float16, device, shape, strides, True, form, one).constants["FLAT"]

    one = dataclasses.replace(config("descriptor"), flat=True)
    assert not flat(config("descriptor"), Form())
    assert flat(one, Form(extra=True))  # a pre-activation
    assert flat(one, Form(main_grad=True))
    assert not flat(one, Form(main_grad=True, extra=True))  # a bias gradient


def test_descriptors_give_way_where_they_cannot_load() -> None:
    from spu.kernels.multiply import Form, plan

    device, one = torch.device("cpu"), config("descriptor")

    def kind(dtype: torch.dtype, strides: tuple[int, int, int, int], aligned: bool = True) -> str:
        return plan("linear", dtype, device, (64, 64, 64), strides, aligned, Form(), one).kind

    assert kind(torch.float16, (64, 1, 1, 64)) == "descriptor"
    assert kind(torch.bfloat16, (1, 64, 64, 1)) == "descriptor"
    assert kind(torch.float32, (64, 1, 1, 64)) == "persistent"
    assert kind(torch.float16, (65, 1, 1, 64)) == "persistent"
    assert kind(torch.float16, (128, 2, 1, 64)) == "persistent"
    assert kind(torch.float16, (64, 1, 1, 64), aligned=False) == "persistent"
