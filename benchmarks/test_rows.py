"""Norms, an embedding's backward and rotary positions, beside torch and transformers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Measure
from torch import Tensor, nn

import spu.ops
from spu.precision import LossScaler, MainGrads

pytest.importorskip("spu._C", reason="spu._C is not built here")
pytestmark = pytest.mark.goals

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = [(512, 512), (512, 2048), (2048, 4096)]  # rows, width


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def step(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    dy = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(measure: Measure, shape: tuple[int, int], dtype: str) -> None:
    x, weight = torch.randn(shape).to(DTYPES[dtype]), torch.ones(shape[1], dtype=DTYPES[dtype])
    ours = step(lambda x, w: spu.ops.rms_norm(x, w, 1e-6, rounded=True), x, weight)  # type: ignore[arg-type,return-value]
    peers = {"llama": step(llama, x, weight), "torch": step(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight)}
    # forward: x and y; backward: dy, x and dx
    measure("rms_norm step", f"{dtype} {'x'.join(map(str, shape))}", f"spu {dtype}", ours,
            bytes_=5.0 * x.numel() * x.element_size(), intensity=2.0, targets={"llama": 1.0, "torch": 0.95},
            paired=peers)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(measure: Measure, shape: tuple[int, int], dtype: str) -> None:
    """fp32 is not here: on a CPU the module leaves it to torch."""
    x, one = torch.randn(shape).to(DTYPES[dtype]), torch.ones(shape[1], dtype=DTYPES[dtype])
    ours = step(lambda x, w, b: spu.ops.layer_norm(x, w, b), x, one, one)  # type: ignore[arg-type,return-value]
    torchs = step(lambda x, w, b: F.layer_norm(x, w.shape, w, b), x, one, one)
    measure("layer_norm step", f"{dtype} {'x'.join(map(str, shape))}", f"spu {dtype}", ours,
            bytes_=5.0 * x.numel() * x.element_size(), intensity=2.0, targets={"torch": 0.95},
            paired={"torch": torchs})  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("vocabulary", [8192, 92544])
def test_embedding_into_main_grads(measure: Measure, vocabulary: int, dtype: str) -> None:
    """A microbatch's gradient of 512 tokens into a main gradient that has values already."""
    tokens, width = 512, 512
    ids = torch.randint(vocabulary, (tokens,))
    dy = torch.randn(tokens, width).to(DTYPES[dtype])

    def backward(lookup: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        weight, scaler = nn.Parameter(torch.zeros(vocabulary, width, dtype=DTYPES[dtype])), LossScaler()
        main = MainGrads([weight])
        main.begin_step()
        return lambda: (main, scaler.scale((lookup(ids, weight) * dy).float().sum()).backward())

    bytes_, paired = tokens * width * (dy.element_size() + 8.0), {"torch": backward(F.embedding)}
    measure("embedding backward", f"{dtype} {tokens} of {vocabulary}", f"spu {dtype}", backward(spu.ops.embedding),
            bytes_=bytes_, intensity=0.25, targets={"torch": 0.95}, paired=paired)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(measure: Measure, dtype: str) -> None:
    q = torch.randn(2, 256, 8, 64).to(DTYPES[dtype]).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 256, 2, 64).to(DTYPES[dtype]).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(1, 256, 64).to(DTYPES[dtype]) for _ in range(2))
    dys = torch.ones_like(q), torch.ones_like(k)

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(q, k, cos, sin), (q, k), dys)

    bytes_ = 4.0 * (q.numel() + k.numel()) * q.element_size()
    measure("rotary step", f"{dtype} 2x256x(8+2)x64", f"spu {dtype}", run(spu.ops.rotary), bytes_=bytes_,
            intensity=0.75, targets={"transformers": 1.0}, paired={"transformers": run(turned)})  # fmt: skip
