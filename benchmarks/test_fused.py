"""The gated MLP and the linear cross-entropy, forward and backward, and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Measure
from torch import Tensor

import spu.ops

pytest.importorskip("spu._C", reason="spu._C is not built here")
pytestmark = pytest.mark.goals

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
# Without AVX512_BF16 plain torch's bf16 products run at about 1 GFLOP/s: minutes a call here.
PEERS = ["spu fp16", "spu bf16", "spu fp32", "torch fp32", *(["torch bf16"] if spu._C.isa() == "avx512bf16" else [])]
GATED = [(128, 256, 704), (256, 1024, 2816)]  # rows, width, inner width
VOCABULARY = [(128, 256, 8192), (64, 512, 92544)]  # rows, width, vocabulary


def leaves(*shapes: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape) / shape[1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]


def in_turns(
    peer: str, plain: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor
) -> dict[str, Callable[[], object]] | None:
    """Plain torch's step in fp32, to run in turns with ours."""
    if not peer.startswith("spu"):
        return None
    wide, gradient = [t.detach().float().requires_grad_() for t in tensors], dy.float()
    return {"torch fp32": lambda: torch.autograd.grad(plain(*wide), wide, gradient)}


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", GATED, ids=str)
def test_gated_mlp(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    """Forward and backward with plain gradients: nine products."""
    rows, width, inner = shape
    tensors = leaves((rows, width), (inner, width), (inner, width), (width, inner), dtype=DTYPES[peer.split()[1]])
    function = spu.ops.gated_mlp if peer.startswith("spu") else swiglu
    dy = torch.randn(rows, width).to(tensors[0].dtype)

    def run() -> None:
        torch.autograd.grad(function(*tensors), tensors, dy)

    measure(
        "gated MLP step", "x".join(map(str, shape)), peer, run, flops=18.0 * rows * width * inner,
        paired=in_turns(peer, swiglu, tensors, dy),
    )  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", VOCABULARY, ids=str)
def test_linear_cross_entropy(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    """Forward and backward with plain gradients: three products, and the logits once more where they are not kept."""
    rows, width, vocabulary = shape
    tensors = leaves((rows, width), (vocabulary, width), dtype=DTYPES[peer.split()[1]])
    target = torch.randint(vocabulary, (rows,))

    def ours() -> Tensor:
        return spu.ops.linear_cross_entropy(*tensors, target)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(*tensors).float(), target)

    function = ours if peer.startswith("spu") else plain

    def run() -> None:
        torch.autograd.grad(function(), tensors)

    def logits_and_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    measure(
        "cross-entropy step", "x".join(map(str, shape)), peer, run, flops=6.0 * rows * width * vocabulary,
        paired=in_turns(peer, logits_and_loss, tensors, torch.ones(())),
    )  # fmt: skip


@pytest.mark.parametrize("peer", ["spu fp16", "widened fp16", "torch fp32", "torch fp16"])
@pytest.mark.parametrize("shape", [(1, 8, 128, 32), (4, 8, 256, 64), (1, 16, 1024, 128)], ids=str)
def test_attention(measure: Measure, shape: tuple[int, int, int, int], peer: str) -> None:
    """Causal attention forward and backward; "widened": torch's fp32 kernel between conversions."""
    batch, heads, tokens, head = shape
    if peer == "torch fp16" and tokens > 256:
        pytest.skip("plain torch takes seconds a step")
    dtype = DTYPES[peer.split()[1]]
    torch.manual_seed(0)
    qkv = [torch.randn(batch, tokens, heads, head).to(dtype).requires_grad_() for _ in range(3)]
    dy = torch.randn(batch, tokens, heads, head).to(dtype)

    def heads_last(*tensors: Tensor) -> Tensor:
        operands = [t.transpose(1, 2) for t in tensors]
        return F.scaled_dot_product_attention(*operands, is_causal=True).transpose(1, 2)

    def run() -> None:
        if peer.startswith("spu"):
            out = spu.ops.attention(*qkv, causal=True)
        else:
            out = heads_last(*(t.float() if peer.startswith("widened") else t for t in qkv)).to(dtype)
        torch.autograd.grad(out, qkv, dy)

    flops = 7.0 * batch * heads * tokens**2 * head
    measure(
        "attention step", "x".join(map(str, shape)), peer, run, flops=flops,
        targets={"widened fp16": 1.0} if peer.startswith("spu") else None,
        paired=in_turns(peer, heads_last, qkv, dy),
    )  # fmt: skip
