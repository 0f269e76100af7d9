"""Gated MLP, cross-entropy, codecs and optimizer kernels against the definitions of spu.ops; run interpreted.

Cases of test_triton_kernels.py, run by it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np
import pytest
import torch
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from spu import kernels
from spu.common import wire
from spu.common.codecs import CODECS
from spu.kernels import codec as codec_kernels
from spu.kernels import launch
from spu.kernels import optim as optim_kernels
from spu.kernels.config import Config
from spu.ops.reference import codec as reference_codec
from spu.ops.reference import fused as reference_fused
from spu.ops.reference import linear as reference_linear
from spu.ops.reference import norm as reference_norm
from spu.ops.reference import optimizer as reference_optimizer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


GATED = [*(("silu", dtype) for dtype in DTYPES), ("gelu", torch.float16), ("gelu_tanh", torch.bfloat16)]


@pytest.mark.parametrize(("activation", "dtype"), GATED)
def test_gated_kernels(activation: str, dtype: torch.dtype) -> None:
    x, w_gate, w_up = (torch.randn(n, 37).to(dtype) / 4 for n in (45, 70, 70))
    dh = torch.randn(45, 70).to(dtype)
    truth = reference_fused.gated_linear(x.double(), w_gate.double(), w_up.double(), activation, True)
    plain = reference_fused.gated_linear(x, w_gate, w_up, activation, True)
    made = kernels.gated_linear(x, w_gate, w_up, activation)
    for name, a, p, t in zip(("h", "gate", "up"), made, plain, truth):
        assert_close_to_truth(a, p, t, eps=torch.finfo(dtype).eps * float(t.abs().max()), name=name)
    assert kernels.gated_linear(x, w_gate, w_up, activation, keep=False)[1].numel() == 0
    gate, up = plain[1:]
    truth = reference_fused.gated_dz(dh.double(), gate.double(), up.double(), activation)
    plain = reference_fused.gated_dz(dh, gate, up, activation)
    for name, a, p, t in zip(("dgate", "dup", "h"), kernels.gated_dz(dh, gate, up, activation), plain, truth):
        assert_close_to_truth(a, p, t, eps=torch.finfo(dtype).eps * float(t.abs().max()), name=name)
    dx = kernels.gated_dx(dh, gate, w_gate, w_up)
    true_dx = reference_fused.gated_dx(dh.double(), gate.double(), w_gate.double(), w_up.double())
    assert_close_to_truth(dx, reference_fused.gated_dx(dh, gate, w_gate, w_up), true_dx, name="dx")


MLP_CASES = [
    *(("tile", torch.float16, name) for name in ("relu", "gelu", "gelu_tanh", "silu")),
    ("tile", torch.bfloat16, "gelu"), ("tile", torch.float32, "silu"), ("descriptor", torch.float16, "gelu"),
    ("torch", torch.float16, "gelu_tanh"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "activation"), MLP_CASES, ids=str)
def test_an_mlps_own_gradient(kind: str, dtype: torch.dtype, activation: str) -> None:
    """Two tiles of rows and of columns, ragged ones but for descriptors, whose rows are aligned."""
    inner, hidden = (24, 64) if kind == "descriptor" else (21, 50)
    dy, w_out, saved = (torch.randn(*size) for size in ((39, inner), (inner, hidden), (39, hidden)))
    dy, w_out, saved = dy.to(dtype), (w_out / 4).to(dtype), saved.to(dtype)
    config = Config(kind, 32, 32, 16)
    truth = reference_fused.mlp_dz(dy.double(), w_out.double(), saved.double(), activation, True, True)
    plain = reference_fused.mlp_dz(dy, w_out, saved, activation, True, True)
    if kind == "torch":  # dh is rounded, as plain torch rounds it
        rounded = reference_linear.linear_dz(dy @ w_out, saved, activation)
        plain = rounded, plain[1], rounded.float().sum(0)
    made = kernels.mlp_dz(dy, w_out, saved, activation, True, True, config)
    for name, a, p, t in zip(("dz", "h", "sums"), made, plain, truth):
        assert_close_to_truth(a, p, t, eps=torch.finfo(dtype).eps * float(t.abs().max()), name=name)
    assert made[2].dtype == torch.float32
    lone = kernels.mlp_dz(dy, w_out, saved, activation, False, False, config)
    assert_equal(lone[0], made[0], "dz alone")
    assert [t.numel() for t in lone[1:]] == [0, 0]


WHOLE = [*((70, 301, dtype) for dtype in DTYPES), (1, 5, torch.float16), (130, 64, torch.bfloat16)]


@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), WHOLE)
def test_cross_entropy_of_the_whole_vocabulary(dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    hidden, weight = torch.randn(rows, 40).to(dtype), torch.randn(vocabulary, 40).to(dtype)
    target, grad = torch.randint(0, vocabulary, (rows,)), torch.randn(rows) * 100
    target[rows // 2] = -7
    loss, lse = kernels.linear_ce(hidden, weight, target, -7)
    expected = reference_fused.linear_ce(hidden.double(), weight.double(), target, -7)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    dz = kernels.linear_ce_dz(hidden, weight, target, lse, grad, -7)
    truth = reference_fused.linear_ce_dz(hidden.double(), weight.double(), target, expected[1], grad.double(), -7)
    plain = reference_fused.linear_ce_dz(hidden, weight, target, lse, grad, -7)
    assert_close_to_truth(dz, plain, truth, eps=torch.finfo(dtype).eps * 400, name="dz")


def test_cross_entropy_keeps_an_overflow_to_its_row() -> None:
    hidden, weight = torch.randn(6, 8), torch.randn(30, 8)
    hidden[2, 3] = float("inf")
    loss, lse = kernels.linear_ce(hidden, weight, torch.zeros(6, dtype=torch.int64), -100)
    assert not loss[2].isfinite()
    assert loss[[0, 1, 3, 4, 5]].isfinite().all()
    dz = kernels.linear_ce_dz(hidden, weight, torch.zeros(6, dtype=torch.int64), lse, torch.ones(6), -100)
    assert not dz[2].isfinite().all()
    assert dz[[0, 1, 3, 4, 5]].isfinite().all()


def awkward(n: int, dtype: torch.dtype) -> Tensor:
    """Many magnitudes, a zero block, a subnormal one, an infinity, a NaN, and ties."""
    x = torch.randn(n) * torch.logspace(-6, 4, n)
    if n > 400:
        x[0:64], x[64:128] = 0, 1e-40
        x[200], x[300] = float("inf"), float("nan")
        x[320:384] = torch.arange(64) - 31.5
    return x.to(dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wires_have_the_reference_bits(dtype: torch.dtype, codec: str) -> None:
    for n in (1, 31, 63, 64, 513, 1000, 2049):
        x = awkward(n, dtype)
        expected = reference_codec.pack(x, codec)
        made = kernels.pack(x, codec, wire.header(x.shape, dtype, codec))
        if codec in ("fp16", "bf16"):  # a NaN's own bits may differ
            stored = torch.float16 if codec == "fp16" else torch.bfloat16
            assert_equal(made[64:].view(stored), expected[64:].view(stored), f"payload of {n}")
            assert_equal(made[:64], expected[:64], "header")
        else:
            assert_equal(made, expected, f"wire of {n}")
        for out in DTYPES:
            value = kernels.unpack(expected, (n,), out, codec)
            assert_equal(value, reference_codec.unpack(expected, (n,), out, codec), f"{n} values in {out}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_quotient_without_a_division_has_a_divisions_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs run, with the C library's fused multiply-add in place of the interpreter's: values beside all ties."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    fused = np.frompyfunc(fmaf, 3, 1)

    def create_fma(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return TensorHandle(fused(x.data, y.data, z.data).astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(codec_kernels, "FUSED", True)
    low, high = (-12, 14) if dtype == torch.float16 else (-122, 120)
    largest = (torch.rand(256) + 1) * torch.randint(low, high, (256,)).float().exp2()
    largest = largest.to(dtype).float()[:, None]
    halves = torch.randint(-127, 127, (256, 63)) + 0.5
    ties = halves * (largest / 127)
    nudged = (ties.view(torch.int32) + torch.randint(-3, 4, ties.shape, dtype=torch.int32)).view(torch.float32)
    blocks = torch.cat([largest, nudged.clamp(-largest, largest)], 1)
    x = blocks.to(dtype)
    expected = reference_codec.pack(x, "int8")
    assert_equal(kernels.pack(x, "int8", wire.header(x.shape, dtype, "int8")), expected, "wire")


@pytest.mark.parametrize("codec", ["fp8_e4m3", "fp8_e5m2"])
def test_every_code_of_fp8_is_its_own(codec: str) -> None:
    """All finite codes of a block with scale 1: decoding and coding again gives the same code."""
    kind = torch.float8_e4m3fn if codec == "fp8_e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = codes.view(kind).float()
    largest = CODECS[codec].largest
    values = values[values.isfinite()]
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    x = torch.cat([torch.full((len(blocks), 1), largest), blocks], 1)  # every block's absmax is the largest code
    made = kernels.pack(x, codec, wire.header(x.shape, x.dtype, codec))
    assert_equal(kernels.unpack(made, x.shape, torch.float32, codec), x, "values")


def optimizer_state(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    masters = [param.float() + 1e-5 for param in params] if dtype != torch.float32 else []
    grads, averages = ([torch.randn(shape) * 0.1 for shape in shapes] for _ in range(2))
    squares = [torch.rand(shape) * 0.1 for shape in shapes]
    steps = [torch.full((1,), float(1 + 40 * i)) for i in range(len(shapes))]
    return [params, grads, masters, averages, squares, steps]


HYPER = (1e-3, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_over_a_list(dtype: torch.dtype) -> None:
    ours = optimizer_state(dtype, [(5,), (130, 150), (33, 3), (0,), (), (8192,), (8193,)])
    theirs = [[value.clone() for value in column] for column in ours]
    scale = torch.tensor([0.7])
    for _ in range(2):
        kernels.adamw_(*ours, scale, torch.zeros(1), *HYPER)
        reference_optimizer.adamw_(*theirs, scale, torch.zeros(1), *HYPER)
    for column, (made, expected) in enumerate(zip(ours, theirs)):
        for a, e in zip(made, expected):
            bound = 1e-6 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, e, rtol=bound, atol=1e-7, msg=lambda m, c=column: f"column {c}: {m}")
    if dtype != torch.float32:
        for param, master in zip(ours[0], ours[2]):
            assert_equal(param, master.to(dtype), "copy of the master")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adamw_takes_weights_that_were_changed(dtype: torch.dtype) -> None:
    ours = optimizer_state(dtype, [(8193,), (33, 3)])
    ours[0][0][100:200] = 0.25
    theirs = [[value.clone() for value in column] for column in ours]
    kernels.adamw_(*ours, torch.ones(1), torch.zeros(1), *HYPER)
    reference_optimizer.adamw_(*theirs, torch.ones(1), torch.zeros(1), *HYPER)
    for made, expected in zip(ours[2], theirs[2]):
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-7)
    assert (ours[2][0][100:200] - 0.25).abs().max() < 0.01


def test_adamw_changes_nothing_after_an_overflow() -> None:
    ours = optimizer_state(torch.float16, [(70, 3), (9,)])
    before = [[value.clone() for value in column] for column in ours]
    kernels.adamw_(*ours, torch.ones(1), torch.ones(1), *HYPER)
    for made, expected in zip(ours, before):
        for a, e in zip(made, expected):
            assert_equal(a, e)


def test_adamw_of_strided_and_unaligned_parameters() -> None:
    base = torch.randn(1001)
    params = [torch.randn(7, 5).t(), base[1:]]  # a transposed one, and one that starts at 4 bytes
    state = [params, [torch.randn(5, 7), torch.randn(1000)], [], [torch.zeros(5, 7), torch.zeros(1000)]]
    state += [[torch.zeros(5, 7), torch.zeros(1000)], [torch.ones(1), torch.ones(1)]]
    theirs = [[value.clone() for value in column] for column in state]
    kernels.adamw_(*state, torch.ones(1), torch.zeros(1), *HYPER)
    reference_optimizer.adamw_(*theirs, torch.ones(1), torch.zeros(1), *HYPER)
    for a, e in zip(params, theirs[0]):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.99999, 0.5, 0.0])
@pytest.mark.parametrize("count", [1.0, 2.0, 100.0, 1e6])
def test_bias_correction_does_not_cancel(beta: float, count: float) -> None:
    """With unit moments and gradients the step is lr * sqrt(1 - beta^t) / (1 - 0^t): the correction shows alone."""
    state = [[torch.zeros(1)], [torch.ones(1)], [], [torch.ones(1)], [torch.ones(1)], [torch.full((1,), count)]]
    kernels.adamw_(*state, torch.ones(1), torch.zeros(1), 1.0, 0.0, beta, 0.0, 0.0)
    expected = -((1 - beta**count) ** 0.5)
    assert abs(state[0][0].item() - expected) <= 4e-7 * abs(expected)


def test_tables_that_a_graph_reads_outlive_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that come later take their place there; a replay would read memory that is someone else's by then."""
    kept: dict[int, Tensor] = {}
    monkeypatch.setattr(launch, "_OF_GRAPHS", kept)
    grad, header = torch.randn(5), bytes(64)

    def run() -> None:
        kernels.grad_sqnorm([grad])
        kernels.pack(grad, "int8", header)

    run()
    work, where = optim_kernels._tables((5,), ((grad.data_ptr(),),), grad.device)
    read = [work.sizes, work.blocks, *where, codec_kernels._header_on(header, grad.device)]
    assert not kept, "outside a graph the caches have them"
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    run()
    monkeypatch.undo()
    for other in [torch.randn(6) for _ in range(100)]:  # all there at once: each at an address of its own
        kernels.grad_sqnorm([other])
    assert optim_kernels._tables((5,), ((grad.data_ptr(),),), grad.device)[1].addresses is not where.addresses
    assert {id(table) for table in kept.values()} == {id(table) for table in read}


def test_grad_sqnorm_over_a_list() -> None:
    grads = [torch.randn(7, 9), torch.randn(20000) * 1e-3, torch.randn(6, 4).t(), torch.empty(0), torch.tensor(2.0)]
    expected = sum(float(grad.double().square().sum()) for grad in grads)
    made = kernels.grad_sqnorm(grads)
    assert made.shape == (1,)
    assert abs(made.item() - expected) <= 1e-6 * expected
    huge = kernels.grad_sqnorm([torch.full((20000,), 1e30), torch.full((3,), 3e-30)])
    assert abs(huge.item() - 2e64) <= 1e-6 * 2e64
    assert abs(kernels.grad_sqnorm([torch.full((3,), 3e-30)]).item() - 2.7e-59) <= 1e-6 * 2.7e-59
    grads[1][5] = float("nan")
    assert kernels.grad_sqnorm(grads).isnan()
    assert kernels.grad_sqnorm([torch.empty(0)]).item() == 0


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(("dtype", "cols"), [(torch.float16, 8197), (torch.bfloat16, 8197), (torch.float32, 8197)])
def test_gradients_of_rows_that_do_not_fit_the_registers(dtype: torch.dtype, cols: int, layer: bool) -> None:
    """A row of more than 8192 is read twice in 16 bits: for its sums, and for its gradient."""
    dy, dsum, x = (torch.randn(7, cols).to(dtype) for _ in range(3))
    weight = torch.randn(cols).to(dtype)
    mean, rstd = (t.contiguous() for t in (x.float().mean(1), 1 / x.float().std(1)))

    def gradients(module: Any, *tensors: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, ...]:
        d, s, v, w, average, root = tensors
        if layer:
            return tuple(module.layer_norm_backward(d, s, v, w, average, root, *needs, needs[1]))
        return tuple(module.rms_norm_backward(d, s, v, w, root, 0.0, False, *needs))

    tensors = dy, dsum, x, weight, mean, rstd
    truth = gradients(reference_norm, *(t.double() for t in tensors), needs=(True, True))
    plain = gradients(reference_norm, *tensors, needs=(True, True))
    made = gradients(kernels, *tensors, needs=(True, True))
    for name, a, p, t in zip(("dx", "dw", "db"), made, plain, truth):
        assert_close_to_truth(a, p, t, eps=torch.finfo(a.dtype).eps * float(t.abs().max()), name=name)
    assert_equal(gradients(kernels, *tensors, needs=(True, False))[0], made[0], "dx alone")
    assert_equal(gradients(kernels, *tensors, needs=(False, True))[1], made[1], "dw alone")
