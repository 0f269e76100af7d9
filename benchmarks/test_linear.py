"""The three products of a linear layer, beside torch's in each dtype.

Shapes are rows x in x out: the large one of plain torch's published weak spots, those of the default language model
(width 256, inner width 704, 256 rows a microbatch), and skinny ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Measure
from torch import Tensor

import spu.ops  # noqa: F401  (defines torch.ops.spu)

pytest.importorskip("spu._C", reason="spu._C is not built here")

OPS = torch.ops.spu
SHAPES = [(2048, 1024, 1024), (2048, 1024, 4096), (256, 256, 256), (256, 256, 704), (256, 704, 256), (16, 1024, 1024),
          (1, 1024, 1024)]  # fmt: skip
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = [f"{library} {dtype}" for library in ("spu", "torch") for dtype in DTYPES]
SLOW_FLOPS = 1e10  # plain torch's fp16 gradients run at about 1 GFLOP/s on many CPUs: not above this size


def operands(shape: tuple[int, int, int], peer: str) -> tuple[Tensor, Tensor, Tensor, float]:
    rows, inner, out = shape
    dtype = DTYPES[peer.split()[1]]
    torch.manual_seed(0)
    x, w, dz = torch.randn(rows, inner), torch.randn(out, inner) / inner**0.5, torch.randn(rows, out)
    return x.to(dtype), w.to(dtype), dz.to(dtype), 2.0 * rows * inner * out


def name_of(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_forward_gelu(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    x, w, _, flops = operands(shape, peer)
    bias = torch.zeros(shape[2], dtype=x.dtype)

    def ours() -> object:
        return OPS.linear.cpu(x, w, bias, "gelu", True)

    def plain() -> object:
        return F.gelu(F.linear(x, w, bias))

    measure("forward + gelu", name_of(shape), peer, ours if peer.startswith("spu") else plain, flops=flops)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_input_gradient(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    _, w, dz, flops = operands(shape, peer)
    if peer == "torch fp16" and flops > SLOW_FLOPS:
        pytest.skip("plain torch fp16 would take minutes at this size")

    def ours() -> object:
        return OPS.linear_dx.cpu(dz, w)

    measure("input gradient", name_of(shape), peer, ours if peer.startswith("spu") else lambda: dz @ w, flops=flops)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_weight_gradient(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    """Ours adds to the fp32 main gradient, unscales and checks; torch's is the product alone."""
    x, w, dz, flops = operands(shape, peer)
    if peer == "torch fp16" and flops > SLOW_FLOPS:
        pytest.skip("plain torch fp16 would take minutes at this size")
    main_grad, inv_scale, found_inf = torch.zeros(w.shape), torch.ones(1), torch.zeros(1)

    def ours() -> object:
        return OPS.linear_dw_.cpu(dz, x, main_grad, inv_scale, found_inf, True)

    measure(
        "weight gradient", name_of(shape), peer, ours if peer.startswith("spu") else lambda: dz.t() @ x, flops=flops
    )
