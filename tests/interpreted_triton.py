"""Cases of test_triton_kernels.py, run by it in a process with TRITON_INTERPRET=1 (read when triton is imported).

Expected values are plain torch expressions written here; products are held to fp64 truth.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spu import kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
FINE = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}
HEADER = bytes(range(64))


def worst(actual: Tensor, truth: Tensor) -> tuple[float, str]:
    """(largest absolute error, where it is)."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    error = (actual.double() - truth).abs().nan_to_num(nan=float("inf"))
    if error.numel() == 0:
        return 0.0, "nothing"
    at = int(error.argmax())
    return (
        error.max().item(),
        f"flat {at} of {tuple(truth.shape)}: {actual.view(-1)[at]} instead of {truth.view(-1)[at]}",
    )


def assert_bound(actual: Tensor, plain: Tensor, truth: Tensor, eps: float) -> None:
    """err(kernel) <= 2 err(plain torch in the same dtype) + eps, against fp64 truth."""
    error, where = worst(actual, truth)
    allowed = 2 * worst(plain, truth)[0] + eps
    assert error <= allowed, f"error {error} > {allowed} at {where}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    same = (actual.contiguous().view(integer) == expected.contiguous().view(integer)) | (
        actual.isnan() & expected.isnan()
    )
    wrong = (~same).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} differ, first {at} of {tuple(actual.shape)}: {actual[at]} != {expected[at]}"
        )


# An activation is computed in fp32, whatever the dtype.
FORWARD = [*((torch.float16, name) for name in ACTIVATIONS), (torch.bfloat16, "gelu"), (torch.float32, "silu")]


@pytest.mark.parametrize(("dtype", "activation"), FORWARD)
def test_linear_fwd(dtype: torch.dtype, activation: str) -> None:
    x, w, b = torch.randn(3, 23, 70).to(dtype), (torch.randn(67, 70) / 8).to(dtype), torch.randn(67).to(dtype)
    y, z = kernels.linear_fwd(x, w, b, activation, keep_preact=True)
    true_z = F.linear(x.double(), w.double(), b.double())
    truth = ACTIVATIONS[activation](true_z)
    plain = ACTIVATIONS[activation](F.linear(x, w, b))
    assert y.dtype == z.dtype == dtype
    assert_bound(y, plain, truth, FINE[dtype] * truth.abs().max().item())
    assert_bound(z, F.linear(x, w, b), true_z, FINE[dtype] * true_z.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_fwd_strided_without_bias(dtype: torch.dtype) -> None:
    x, w = torch.randn(40, 5).to(dtype).t(), torch.randn(40, 9).to(dtype).t()  # both transposed views
    y, z = kernels.linear_fwd(x, w)
    truth = x.double() @ w.double().t()
    assert z.shape == (0,)
    assert_bound(y, x @ w.t(), truth, FINE[dtype] * truth.abs().max().item())


@pytest.mark.parametrize(("shape", "n"), [((1, 8), 1), ((0, 8), 5), ((4, 0), 5), ((7,), 3)])
def test_linear_fwd_small_and_empty(shape: tuple[int, ...], n: int) -> None:
    x, w, b = torch.randn(shape), torch.randn(n, shape[-1]), torch.randn(n)
    y, _ = kernels.linear_fwd(x, w, b)
    torch.testing.assert_close(y, F.linear(x, w, b), rtol=1e-5, atol=1e-5)


def test_linear_fwd_keeps_nonfinite() -> None:
    x = torch.randn(4, 16, dtype=torch.float16)
    x[1, 3], x[2, 0] = float("inf"), float("nan")
    y, _ = kernels.linear_fwd(x, torch.randn(8, 16, dtype=torch.float16), activation="relu")
    assert y[2].isnan().all()
    assert not y[1].isfinite().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(70, 67, 33), (1, 5, 130), (64, 64, 64)])
def test_linear_dw(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    dz, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
    main, inv, found = torch.full((n, k), float("nan")), torch.tensor([2.0**-10]), torch.zeros(1)
    truth, plain = (dz.double().t() @ x.double()) * 2.0**-10, (dz.float().t() @ x.float()) * 2.0**-10
    eps = 2.0**-22 * truth.abs().max().item()
    kernels.linear_dw_(dz, x, main, inv, found, accumulate=False)  # stores: the NaN that was there is gone
    assert_bound(main, plain, truth, eps)
    kernels.linear_dw_(dz, x, main, inv, found, accumulate=True)
    assert_bound(main, 2 * plain, 2 * truth, 2 * eps)
    assert found.item() == 0


def test_linear_dw_keeps_what_fp16_cannot_hold() -> None:
    dz, x = torch.full((4, 3), 2.0**-6).half(), torch.full((4, 2), 2.0**-6).half()
    main = torch.empty(3, 2)
    kernels.linear_dw_(dz, x, main, torch.tensor([2.0**-16]), torch.zeros(1), accumulate=False)
    assert torch.equal(main, torch.full((3, 2), 4 * 2.0**-28))  # below fp16's smallest subnormal, 2^-24


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_linear_dw_reports_overflow(value: float) -> None:
    dz, x = torch.randn(80, 70).half(), torch.randn(80, 70).half()
    dz[79, 69] = value
    main, found = torch.empty(70, 70), torch.zeros(1)
    kernels.linear_dw_(dz, x, main, torch.ones(1), found, accumulate=False)
    assert found.item() == 1
    assert not main[69].isfinite().any()
    assert main[:69].isfinite().all()
    kernels.linear_dw_(
        torch.zeros(1, 70).half(), torch.zeros(1, 70).half(), main, torch.ones(1), found, accumulate=False
    )
    assert found.item() == 1, "found_inf must never be reset"


def test_linear_dw_over_no_rows_stores_zero() -> None:
    main = torch.full((5, 6), float("nan"))
    kernels.linear_dw_(torch.empty(0, 5), torch.empty(0, 6), main, torch.ones(1), torch.zeros(1), accumulate=False)
    assert torch.equal(main, torch.zeros(5, 6))


def expected_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scales [blocks], codes [numel]) by plain torch."""
    flat = x.float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    scales = absmax / 127
    scales[scales < torch.finfo(torch.float32).tiny] = 0
    scales[~absmax.isfinite()] = float("nan")
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = torch.where((scales > 0)[:, None], (blocks / divisor[:, None]).round().clamp(-127, 127), 0.0)
    return scales, codes.to(torch.int8).view(-1)[: len(flat)]


def awkward(n: int, dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes with a zero block, a subnormal one, an infinity, a NaN, and ties."""
    x = torch.randn(n) * torch.logspace(-6, 4, n)
    x[0:64] = 0
    x[64:128] = 1e-40
    x[200], x[300] = float("inf"), float("nan")
    x[320:384] = torch.arange(64) - 31.5
    x[383] = 127
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, 1088, 2049])
def test_int8_wire(dtype: torch.dtype, n: int) -> None:
    x = awkward(n, dtype)
    wire = kernels.pack(x, "int8", HEADER)
    scales, codes = expected_int8(x)
    count, section = len(scales), -(-4 * len(scales) // 64) * 64
    assert bytes(wire[:64].tolist()) == HEADER
    assert_same_bits(wire[64 : 64 + 4 * count].view(torch.float32), scales)
    assert not wire[64 + 4 * count : 64 + section].any(), "padding of the scales must be zero"
    assert_same_bits(wire[64 + section : 64 + section + n].view(torch.int8), codes)
    assert not wire[64 + section + n :].any(), "padding of the payload must be zero"
    assert len(wire) == 64 + section + -(-n // 64) * 64
    for out in DTYPES:
        values = codes.float() * scales.repeat_interleave(64)[:n]
        assert_same_bits(kernels.unpack(wire, x.shape, out, "int8"), values.to(out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_plain_wires(dtype: torch.dtype, codec: str) -> None:
    x = awkward(1300, dtype)
    stored = x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[codec])
    wire = kernels.pack(x, codec, HEADER)
    assert len(wire) == 64 + -(-2 * 1300 // 64) * 64
    assert_same_bits(wire[64 : 64 + 2600].view(stored.dtype), stored)
    assert not wire[64 + 2600 :].any(), "padding must be zero"
    for out in DTYPES:
        assert_same_bits(kernels.unpack(wire, (130, 10), out, codec), stored.to(out).view(130, 10))


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_strided_and_empty(codec: str) -> None:
    x = torch.randn(6, 50)
    assert torch.equal(kernels.pack(x.t(), codec, HEADER), kernels.pack(x.t().contiguous(), codec, HEADER))
    empty = kernels.pack(x[:0], codec, HEADER)
    assert bytes(empty.tolist()) == HEADER
    assert kernels.unpack(empty, (0, 50), torch.float16, codec).shape == (0, 50)


def test_bad_input_names_value_and_fix() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"unknown activation 'swish'.*silu"):
        kernels.linear_fwd(x, w, activation="swish")
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear_fwd(x, torch.randn(3, 5))
    with pytest.raises(ValueError, match="share dtype"):
        kernels.linear_fwd(x, w.half())
    with pytest.raises(TypeError, match="float64 is not supported"):
        kernels.linear_fwd(x.double(), w.double())
    with pytest.raises(ValueError, match="main_grad"):
        kernels.linear_dw_(x, x, torch.empty(4, 4).half(), torch.ones(1).half(), torch.zeros(1).half(), False)
    with pytest.raises(ValueError, match="unknown codec 'int3'"):
        kernels.pack(x, "int3", HEADER)
    with pytest.raises(ValueError, match=r"uint8 \[192\]"):
        kernels.unpack(torch.zeros(65, dtype=torch.uint8), (2, 4), torch.float32, "int8")
