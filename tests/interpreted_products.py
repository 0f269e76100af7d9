"""Products in every kind of launch and every configuration of the tables, against fp64; run interpreted.

Cases of test_triton_kernels.py, run by it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor

from spu import kernels
from spu.kernels import table
from spu.kernels.table import KINDS, Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(70, 67, 130), (33, 72, 40), (5, 1, 3)]  # rows, out, in


def config(kind: str, **changes: int) -> Config:
    return dataclasses.replace(Config(kind, 32, 64, 32, 2, 4, 2, 3 if kind == "split" else 1), **changes)


def shipped() -> list[object]:
    """Every configuration of the shipped tables, each with the ops that use it (warps and stages change no result)."""
    found: dict[tuple[str, Config], None] = {}
    for path in sorted(table.SHIPPED.glob("*.json")):
        for key, entry in table.read(path).entries.items():
            found[key.split("/")[0], dataclasses.replace(entry.config, group_m=2, num_warps=4, num_stages=2)] = None
    return [pytest.param(op, one, id=f"{op}-{one.kind}-{one.block_m}x{one.block_n}x{one.block_k}") for op, one in found]


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, w, b, dz = operands(shape, dtype)
    one = config(kind)
    check_forward(x, w, b, one)
    check_dw(dz, x, one)
    close(kernels.linear_dx(dz, w, config=one), dz @ w, dz.double() @ w.double(), f"dx {one}")
    close(kernels.linear_dw(dz, x, config=one), dz.t() @ x, dz.double().t() @ x.double(), f"dw {one}")


@pytest.mark.parametrize("kind", KINDS)
def test_strided_operands(kind: str) -> None:
    x, w, b, dz = operands((70, 72, 40), torch.float16)
    check_forward(x.t().contiguous().t(), w.repeat_interleave(3, 0)[::3], b, config(kind))
    check_forward(x.repeat_interleave(2, 1)[:, ::2], w.t().contiguous().t(), b, config(kind))
    check_dw(dz.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], config(kind))


@pytest.mark.parametrize(("op", "one"), shipped())
def test_shipped_configurations(op: str, one: Config) -> None:
    """One tile and a ragged bit more in each direction, and enough to split."""
    if one.kind == "torch":
        shape = (20, 30, 40)
    else:
        shape = (one.block_m + 3, one.block_n + 5, one.block_k * (1 + one.split_k) + 7)
    x, w, b, _ = operands(shape, torch.float16)
    if op == "linear":
        check_forward(x, w, b, one)
    elif op == "linear_dx":
        close(kernels.linear_dx(x, w.t(), config=one), x @ w.t(), x.double() @ w.double().t(), f"dx {one}")
    elif op == "linear_dz_dx":
        check_derivative_on_load(x, w.t(), one, "gelu")
    elif op == "linear_dw":
        check_dw(x.t(), w.t(), one)
    elif op == "gated_linear":
        check_gated(x, w, one)
    elif op == "gated_dx":
        truth = 2 * (x.double() @ w.double().t())
        close(kernels.gated_dx(x, x, w.t(), w.t(), config=one), x @ w.t() + x @ w.t(), truth, f"gated_dx {one}")
    else:
        assert op == "linear_ce"
        check_cross_entropy(x, w, one)


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


@pytest.mark.parametrize("kind", KINDS)
def test_split_and_all_others_repeat_their_bits(kind: str) -> None:
    x, _, _, dz = operands((200, 33, 65), torch.float16)
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
    from spu.kernels.multiply import plan

    device = torch.device("cpu")
    narrow = plan("linear", torch.float16, device, (8, 8, 8), (1000, 1, 1, 1000), True, False, None)
    wide = plan("linear", torch.float16, device, (8, 8, 8), (1 << 26, 1, 1, 1000), True, False, None)
    assert not narrow.constants["WIDE"]
    assert wide.constants["WIDE"]
    x = torch.randn(1, 40).as_strided((1, 40), (1 << 26, 1))
    w = torch.randn(9, 40)
    close(kernels.linear_fwd(x, w)[0], x @ w.t(), x.double() @ w.double().t(), "wide")


def test_descriptors_give_way_where_they_cannot_load() -> None:
    from spu.kernels.multiply import plan

    device, one = torch.device("cpu"), config("descriptor")

    def kind(dtype: torch.dtype, strides: tuple[int, int, int, int], aligned: bool = True) -> str:
        return plan("linear", dtype, device, (64, 64, 64), strides, aligned, False, one).kind

    assert kind(torch.float16, (64, 1, 1, 64)) == "descriptor"
    assert kind(torch.bfloat16, (1, 64, 64, 1)) == "descriptor"
    assert kind(torch.float32, (64, 1, 1, 64)) == "persistent"
    assert kind(torch.float16, (65, 1, 1, 64)) == "persistent"
    assert kind(torch.float16, (128, 2, 1, 64)) == "persistent"
    assert kind(torch.float16, (64, 1, 1, 64), aligned=False) == "persistent"
