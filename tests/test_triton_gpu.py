"""Every Triton kernel on a real device, against fp64 on the host; and the training job there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal, tensor_core_limit
from torch import Tensor, nn

from spu import kernels, ops
from spu.common import wire
from spu.common.codecs import CODECS
from spu.ops.reference import codec as reference_codec
from spu.ops.reference import fused as reference_fused
from spu.ops.reference import linear as reference
from spu.ops.reference import norm as reference_norm
from spu.ops.reference import optimizer as reference_optimizer

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(16, 512, 1024), (300, 257, 130), (1024, 1024, 512), (2048, 4096, 1024)]  # rows, out, in


def device_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def close(actual: Tensor, plain: Tensor, truth: Tensor, name: str, limit: Tensor | None = None) -> None:
    eps = 2 * torch.finfo(actual.dtype).eps * float(truth[truth.isfinite()].abs().max())
    assert_close_to_truth(actual, plain, truth, eps=eps, limit=limit, name=name)


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, out, inner = shape
    made = (torch.randn(rows, inner), torch.randn(out, inner) / inner**0.5, torch.randn(out), torch.randn(rows, out))
    return [value.to(dtype) for value in made]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_as_the_tables_launch_them(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, w, b, dz = operands(shape, dtype)
    dx_, dw_, db_, ddz = device_of(x, w, b, dz)
    y, z = kernels.linear_fwd(dx_, dw_, db_, "gelu", True)
    truth = F.linear(x.double(), w.double(), b.double())
    plain = F.linear(dx_, dw_, db_)
    close(z, plain, truth, "z")
    close(y, F.gelu(plain), F.gelu(truth), "y")
    close(kernels.linear_dx(ddz, dw_), ddz @ dw_, dz.double() @ w.double(), "dx")
    main, bias = torch.full(w.shape, float("nan"), device="cuda"), torch.full(b.shape, float("nan"), device="cuda")
    inv, found = torch.full((1,), 2.0**-10, device="cuda"), torch.zeros(1, device="cuda")
    limit = None if dtype == torch.float32 else tensor_core_limit(dz.t(), x) / 1024
    for times, accumulate in ((1, False), (2, True)):
        kernels.linear_dw_(ddz, dx_, main, inv, found, accumulate, bias)
        truth_w = times * (dz.double().t() @ x.double()) / 1024
        allowed = None if limit is None else times * limit
        close(main, times * (ddz.float().t() @ dx_.float()) / 1024, truth_w, f"main_grad x{times}", allowed)
        close(bias, times * ddz.float().sum(0) / 1024, times * dz.double().sum(0) / 1024, f"bias_grad x{times}")
    assert found.item() == 0


@pytest.mark.parametrize("kind", ["tile", "persistent", "descriptor", "split", "torch", "cublaslt"])
def test_every_kind_of_launch(kind: str) -> None:
    from spu.kernels.config import Config

    if torch.cuda.get_device_capability() < (8, 0) and kind not in ("torch", "cublaslt"):
        pytest.skip("Triton has no tensor-core product before sm_80")
    if torch.cuda.get_device_capability() < (9, 0) and kind == "descriptor":
        pytest.skip("tensor descriptors need sm_90")
    one = Config(kind, 64, 128, 64, 8, 4, 3, 4 if kind == "split" else 1)
    x, w, b, dz = operands((520, 392, 1024), torch.float16)
    on = device_of(x, w, b, dz)
    y, _ = kernels.linear_fwd(*on[:3], "none", config=one)
    close(y, F.linear(*on[:3]), F.linear(x.double(), w.double(), b.double()), f"y by {kind}")
    results = []
    for _ in range(2):
        main, found = torch.empty(w.shape, device="cuda"), torch.zeros(1, device="cuda")
        one_f = torch.ones(1, device="cuda")
        kernels.linear_dw_(on[3], on[0], main, one_f, found, False, torch.empty(392, device="cuda"), config=one)
        results.append(main)
    assert_equal(results[0], results[1], f"main_grad by {kind}, twice")
    plain, limit = on[3].float().t() @ on[0].float(), tensor_core_limit(dz.t(), x)
    close(results[0], plain, dz.double().t() @ x.double(), f"main_grad by {kind}", limit)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_overflow_is_found(value: float) -> None:
    x, _, _, dz = operands((512, 256, 256), torch.float16)
    dz[500, 255] = value
    x, dz = device_of(x, dz)
    main, found = torch.empty(256, 256, device="cuda"), torch.zeros(1, device="cuda")
    kernels.linear_dw_(dz, x, main, torch.ones(1, device="cuda"), found, False)
    assert found.item() == 1
    assert main[:255].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives(dtype: torch.dtype, activation: str) -> None:
    _, w, _, dy = operands((200, 130, 96), dtype)
    saved = torch.randn(dy.shape).to(dtype)
    on = device_of(dy, saved, w)
    expected = kernels.linear_dz(on[0], on[1], activation)
    truth = reference.linear_dz(dy.double(), saved.double(), activation)
    close(expected, reference.linear_dz(on[0], on[1], activation), truth, "dz")
    dz, dx = kernels.linear_dz_dx(on[0], on[1], on[2], activation)
    assert_equal(dz, expected, "dz on load")
    close(dx, expected @ on[2], expected.double() @ on[2].double(), "dx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_kernels(dtype: torch.dtype) -> None:
    x, gate_w, _, dh = operands((260, 390, 130), dtype)
    up_w = gate_w.flip(0)
    on = device_of(x, gate_w, up_w, dh)
    made = kernels.gated_linear(*on[:3], "silu")
    truth = reference_fused.gated_linear(x.double(), gate_w.double(), up_w.double(), "silu", True)
    plain = reference_fused.gated_linear(*on[:3], "silu", True)
    for name, a, p, t in zip(("h", "gate", "up"), made, plain, truth):
        close(a, p, t, name)
    grads = kernels.gated_dz(on[3], plain[1], plain[2], "silu")
    truth = reference_fused.gated_dz(dh.double(), plain[1].double().cpu(), plain[2].double().cpu(), "silu")
    for name, a, p, t in zip(("dgate", "dup", "h"), grads, reference_fused.gated_dz(on[3], *plain[1:], "silu"), truth):
        close(a, p, t, name)
    dx = kernels.gated_dx(grads[0], grads[1], on[1], on[2])
    wide = [value.double() for value in (grads[0], grads[1], on[1], on[2])]
    close(dx, reference_fused.gated_dx(grads[0], grads[1], on[1], on[2]), reference_fused.gated_dx(*wide), "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [64, 1024])
def test_gated_dh_in_the_epilogue(rows: int, dtype: torch.dtype) -> None:
    dy, w_down = torch.randn(rows, 512).to(dtype), (torch.randn(512, 1024) / 32).to(dtype)
    gate, up = (torch.randn(rows, 1024).to(dtype) for _ in range(2))
    on = device_of(dy, w_down, gate, up)
    truth = reference_fused.gated_dz(dy.double() @ w_down.double(), gate.double(), up.double(), "silu")
    plain = reference_fused.gated_dz(on[0] @ on[1], on[2], on[3], "silu")
    for name, a, p, t in zip(("dgate", "dup", "h"), kernels.gated_dh(*on, "silu"), plain, truth):
        close(a, p, t, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("kind", ["", "torch", "cublaslt"])
def test_an_mlps_own_gradient_in_the_epilogue(kind: str, rows: int, dtype: torch.dtype) -> None:
    from spu.kernels.config import Config

    dy, w_out = torch.randn(rows, 512).to(dtype), (torch.randn(512, 1024) / 32).to(dtype)
    saved = torch.randn(rows, 1024).to(dtype)
    on = device_of(dy, w_out, saved)
    for activation in ("gelu_tanh", "relu"):  # cuBLASLt's own derivative, and one after its product
        truth = reference_fused.mlp_dz(dy.double(), w_out.double(), saved.double(), activation, True, True)
        plain = list(reference_fused.mlp_dz(*on, activation, True, True))
        if kind and dtype != torch.float32:  # a product that is rounded before the derivative, as plain torch's
            plain[0] = reference.linear_dz(on[0] @ on[1], on[2], activation)
            plain[2] = reference_fused.row_sums(plain[0])
        made = kernels.mlp_dz(*on, activation, True, True, Config(kind) if kind else None)
        for name, a, p, t in zip(("dz", "h", "sums"), made, plain, truth):
            close(a, p, t, f"{name} ({activation})")


def test_fp16_accumulation_is_close_and_gives_up_where_it_overflows() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("products are cuBLAS's there")
    x, w, _, _ = operands((256, 512, 1024), torch.float16)
    on = device_of(x, w)
    with kernels.fp16_accumulation():
        y, _ = kernels.linear_fwd(*on)
        bound = 128 / 16 * 2.0**-11 * (x.double().abs() @ w.double().abs().t()) + 1e-2
        assert ((y.cpu() - x.double() @ w.double().t()).abs() <= bound).all()
        # Another weight's shape than above: its first product is checked. fp16 holds the whole sums, not their parts.
        large, torn = torch.full((256, 1024), 30.0), torch.full((640, 1024), 300.0)
        torn[:, 512:] = -299.0
        there = device_of(large.half(), torn.half())
        kernels.linear_fwd(*there)
        torch.cuda.synchronize()
        with pytest.warns(RuntimeWarning, match="fp16 accumulation is off"):
            kernels.linear_fwd(*there)
        assert kernels.linear_fwd(*there)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["tile", "torch"])
def test_leading_dimensions_are_kept(kind: str) -> None:
    from spu.kernels.config import Config

    x, w = torch.randn(2, 64, 128).half().cuda(), torch.randn(96, 128).half().cuda()
    if torch.cuda.get_device_capability() < (8, 0) and kind not in ("torch", "cublaslt"):
        pytest.skip("Triton has no tensor-core product before sm_80")
    y, _ = kernels.linear_fwd(x, w, config=Config(kind))
    assert y.shape == (2, 64, 96)
    assert kernels.linear_dx(y, w, config=Config(kind)).shape == x.shape


def test_tensors_of_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w = torch.randn(64, 128).half().to("cuda:1"), torch.randn(96, 128).half().to("cuda:1")
    with torch.cuda.device(0), ops.use_backend("triton"):
        y = ops.linear_act(x, w)
        total = ops.grad_sqnorm([x.float()])
    close(y, x @ w.t(), x.cpu().double() @ w.cpu().double().t(), "y")
    assert total.device == x.device


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(n, 128).to(dtype) for n in (300, 5003))
    target, grad = torch.randint(0, 5003, (300,)), torch.randn(300) * 100
    target[7] = -100
    on = device_of(hidden, weight, target, grad)
    loss, lse = kernels.linear_ce(*on[:3], -100)
    expected = reference_fused.linear_ce(hidden.double(), weight.double(), target, -100)
    bound = 1e-4 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.cpu().double(), expected[0], rtol=1e-4, atol=bound)
    dz = kernels.linear_ce_dz(*on[:3], lse, on[3], -100)
    truth = reference_fused.linear_ce_dz(hidden.double(), weight.double(), target, expected[1], grad.double(), -100)
    plain = reference_fused.linear_ce_dz(*on[:3], lse, on[3], -100)
    assert_close_to_truth(dz, plain, truth, eps=400 * bound, name="dz")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wires_have_the_reference_bits(dtype: torch.dtype, codec: str) -> None:
    x = (torch.randn(100_003) * torch.logspace(-6, 4, 100_003)).to(dtype)
    expected = reference_codec.pack(x, codec)
    made = kernels.pack(x.cuda(), codec, wire.header(x.shape, dtype, codec))
    assert_equal(made.cpu(), expected, codec)
    for out in DTYPES:
        value = kernels.unpack(made, x.shape, out, codec)
        assert_equal(value.cpu(), reference_codec.unpack(expected, x.shape, out, codec), f"{codec} to {out}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_optimizer_kernels(dtype: torch.dtype) -> None:
    shapes = [(1000, 33), (7,), (65, 129), (0,), (8193,)]
    params = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    masters = [param.float() + 1e-5 for param in params] if dtype != torch.float32 else []
    state = [params, [torch.randn(s, device="cuda") for s in shapes], masters]
    state += [[torch.rand(s, device="cuda") for s in shapes] for _ in range(2)]
    state.append([torch.full((1,), 3.0, device="cuda") for _ in shapes])
    theirs = [[value.clone() for value in column] for column in state]
    hyper = (torch.full((1,), 0.7, device="cuda"), torch.zeros(1, device="cuda"), 1e-3, 0.9, 0.999, 1e-8, 0.1)
    kernels.adamw_(*state, *hyper)
    reference_optimizer.adamw_(*theirs, *hyper)
    for made, expected in zip(state, theirs):
        for a, e in zip(made, expected):
            bound = 2e-6 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, e, rtol=bound, atol=1e-6)
    total = sum(float(grad.double().square().sum()) for grad in state[1])
    assert abs(kernels.grad_sqnorm(state[1]).item() - total) <= 1e-5 * total


def test_ops_choose_these_kernels_and_train_a_layer() -> None:
    """linear_act on CUDA tensors: chosen automatically, forward and backward, on autograd's own device thread."""
    layer, x = nn.Linear(256, 192).cuda().half(), torch.randn(128, 256, device="cuda", dtype=torch.float16)
    assert ops.choose_backend(x, op="linear", shape=(128, 192, 256)) != "reference"
    with ops.use_backend("triton"):
        y = ops.linear_act(x.requires_grad_(), layer.weight, layer.bias, "gelu")
    y.float().square().mean().backward()
    plain = F.gelu(F.linear(x.detach().float(), layer.weight.float(), layer.bias.float()))
    torch.testing.assert_close(y.float(), plain, rtol=4e-3, atol=4e-3)
    for value in (x, layer.weight, layer.bias):
        assert value.grad is not None
        assert value.grad.isfinite().all()


@pytest.mark.timeout(500)
def test_the_training_job_learns(tmp_path: Path) -> None:
    code = (
        "from spu.cli.train import train_command\n"
        "from spu.train.config import RunOptions\n"
        f"train_command(dict(devices='cuda:0', steps=60, evals=2), RunOptions(out={str(tmp_path)!r}, name='gpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "gpu").is_dir()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [130, 4096])
def test_norms(dtype: torch.dtype, cols: int) -> None:
    x, residual, weight, dy = (
        torch.randn(shape).to(dtype) for shape in ((300, cols), (300, cols), (cols,), (300, cols))
    )
    on = device_of(x, residual, weight, dy)
    wide = [value.double() for value in (x, residual, weight, dy)]
    made = kernels.rms_norm(*on[:3], 1e-6, 0.0, True)
    plain, truth = (reference_norm.rms_norm(*given[:3], 1e-6, 0.0, True) for given in (on, wide))
    for name, a, p, t in zip(("y", "rstd", "sum"), made, plain, truth):
        close(a, p, t, name)
    made, plain, truth = (
        function(given[3], given[1], given[0], given[2], rstd, 0.0, False, True, True)
        for function, given, rstd in (
            (kernels.rms_norm_backward, on, plain[1]),
            (reference_norm.rms_norm_backward, on, plain[1]),
            (reference_norm.rms_norm_backward, wide, plain[1].cpu().double()),
        )
    )
    for name, a, p, t in zip(("dx", "dw"), made, plain, truth):
        close(a, p, t, name)
    functions = ((kernels.layer_norm, on), (reference_norm.layer_norm, on), (reference_norm.layer_norm, wide))
    made, plain, truth = (function(given[0], None, given[2], given[2], 1e-5) for function, given in functions)
    for name, a, p, t in zip(("y", "mean", "rstd"), made, plain, truth):
        close(a, p, t, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embeddings_gradient_and_rotary_positions(dtype: torch.dtype) -> None:
    ids, dy = torch.randint(0, 500, (2048,)) ** 2 % 500, torch.randn(2048, 520).to(dtype)
    main, found, inv = torch.ones(500, 520), torch.zeros(1), torch.tensor([0.5])
    results = []
    for move in (torch.Tensor.cuda, torch.Tensor.cpu):
        given = [move(t.clone()) for t in (dy, ids, main, inv, found)]
        op = kernels.embedding_dw_ if given[0].is_cuda else reference_norm.embedding_dw_
        for accumulate in (True, False, True):
            op(given[0], given[1], 7, given[2], given[3], given[4], accumulate)
        results.append(given[2].cpu())
        assert given[4].item() == 0
    assert_equal(results[0], results[1])  # the same order of additions
    q, k, cos, sin = (torch.randn(s).to(dtype) for s in ((2, 8, 65, 128), (2, 2, 65, 128), (1, 65, 128), (1, 65, 128)))
    on = device_of(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin)
    for how in ((False, False), (True, False), (False, True), (True, True)):
        truth = reference_norm.rotary(*(t.double() for t in (q, k, cos, sin)), *how)
        for a, p, t in zip(kernels.rotary(*on, *how), reference_norm.rotary(*on, *how), truth):
            close(a, p, t, str(how))
