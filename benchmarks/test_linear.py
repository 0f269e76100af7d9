"""The three products of a linear layer, beside torch's in each dtype, every result held to the error bound.

Shapes are rows x in x out: the large one of plain torch's published weak spots, those of the default language model
(width 256, inner width 704, microbatches of 128 and 256 rows), skinny ones, and a vocabulary as in or out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import Measure
from numeric import assert_close_to_truth
from torch import Tensor

import spu.ops  # noqa: F401  (defines torch.ops.spu)

pytest.importorskip("spu._C", reason="spu._C is not built here")

OPS = torch.ops.spu
LARGE = (2048, 1024, 4096)
SHAPES = [
    LARGE, (128, 192, 512), (256, 256, 704), (16, 1024, 4096), (64, 1024, 4096), (256, 1024, 4096),
    (64, 512, 92544), (64, 92544, 512),
]  # fmt: skip
SINGLE = (1, 1024, 1024)  # a row of inference
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = [f"{library} {dtype}" for library in ("spu", "torch") for dtype in DTYPES]
PEER_SECONDS = 0.2  # plain torch's 16-bit products run at 1 GFLOP/s on many CPUs: fewer rows where that takes longer
PROBE_ROWS = 2
# Rows of a result that are compared with fp64. Plain is torch's fp32 product, rounded: its 16-bit ones take seconds.
SAMPLE = 8

Run = Callable[[], Tensor]


@cache
def torch_row_seconds(dtype: torch.dtype, kind: str, inner: int, out: int) -> float:
    """Seconds that plain torch takes for a row of a product of a kind: "forward", "input" or "weight"."""
    x, w, dz = (torch.ones(size).to(dtype) for size in ((PROBE_ROWS, inner), (out, inner), (PROBE_ROWS, out)))
    run = {"forward": lambda: F.linear(x, w), "input": lambda: dz @ w, "weight": lambda: dz.t() @ x}[kind]
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / PROBE_ROWS


class Case:
    """Operands of one shape and dtype; fewer rows where the peer would take minutes."""

    def __init__(self, shape: tuple[int, int, int], peer: str, kind: str) -> None:
        rows, inner, out = shape
        self.slow = False
        if not peer.startswith("spu") and peer != "torch fp32":
            most = int(PEER_SECONDS / torch_row_seconds(DTYPES[peer.split()[1]], kind, inner, out))
            self.slow, rows = most < rows / 8, max(1, min(rows, most)) if most < rows / 8 else rows
        self.peer, self.ours, dtype = peer, peer.startswith("spu"), DTYPES[peer.split()[1]]
        torch.manual_seed(0)
        self.x = torch.randn(rows, inner).to(dtype)
        self.w = (torch.randn(out, inner) / inner**0.5).to(dtype)
        self.dz = torch.randn(rows, out).to(dtype)
        self.flops = 2.0 * rows * inner * out
        self.name = "x".join(map(str, shape))

    def paired(self, plain: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Run] | None:
        """The same product by torch in fp32, for ours."""
        if not self.ours:
            return None
        operands = self.x.float(), self.w.float(), self.dz.float()
        return {"torch fp32": lambda: plain(*operands)}

    def targets(self, ceiling: float, **ratios: float) -> dict[str, float] | None:
        """Those of the large fp16 shape."""
        if self.peer != "spu fp16":
            return None
        at_least = {"torch fp32": 1.0}
        if self.name == "x".join(map(str, LARGE)):
            at_least = {"ceiling": ceiling, **{f"torch {name}": ratio for name, ratio in ratios.items()}}
        return at_least


def nbytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def check(ours: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    assert_close_to_truth(ours, plain, truth, name=name)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", [*SHAPES, SINGLE], ids=str)
def test_forward_gelu(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    c = Case(shape, peer, "forward")
    bias = torch.randn(shape[2]).to(c.x.dtype)
    wide_bias = bias.float()

    def ours() -> Tensor:
        return OPS.linear.cpu(c.x, c.w, bias, "gelu", True)[0]

    def plain() -> Tensor:
        return F.gelu(F.linear(c.x, c.w, bias))

    if c.ours:
        truth = F.gelu(F.linear(c.x[:SAMPLE].double(), c.w.double(), bias.double()))
        wide = F.gelu(F.linear(c.x.float(), c.w.float(), bias.float()))[:SAMPLE].to(c.x.dtype)
        check(ours()[:SAMPLE], wide, truth, f"forward {c.name} {peer}")
    measure(
        "forward + gelu", c.name, peer, ours if c.ours else plain, flops=c.flops, bytes_=nbytes(c.x, c.w, c.dz, c.dz),
        targets=c.targets(0.75, fp32=2.2, fp16=8), slow=c.slow,
        paired=c.paired(lambda x, w, dz: F.gelu(F.linear(x, w, wide_bias))),
    )  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    c = Case(shape, peer, "input")

    def ours() -> Tensor:
        return OPS.linear_dx.cpu(c.dz, c.w)

    if c.ours:
        wide = (c.dz.float() @ c.w.float())[:SAMPLE].to(c.x.dtype)
        check(ours()[:SAMPLE], wide, c.dz[:SAMPLE].double() @ c.w.double(), f"input gradient {c.name} {peer}")
    measure(
        "input gradient", c.name, peer, ours if c.ours else lambda: c.dz @ c.w, flops=c.flops,
        bytes_=nbytes(c.x, c.w, c.dz), targets=c.targets(0.70, fp32=2, fp16=100), slow=c.slow,
        paired=c.paired(lambda x, w, dz: dz @ w),
    )  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(measure: Measure, shape: tuple[int, int, int], peer: str) -> None:
    """Ours adds to the fp32 main gradient, unscales and checks; torch's is the product alone."""
    c = Case(shape, peer, "weight")
    main_grad, inv_scale, found_inf = torch.zeros(c.w.shape), torch.ones(1), torch.zeros(1)

    def ours() -> Tensor:
        OPS.linear_dw_.cpu(c.dz, c.x, main_grad, inv_scale, found_inf, True)
        return main_grad

    if c.ours:
        wide = (c.dz.float().t() @ c.x.float())[:SAMPLE]
        truth = c.dz[:, :SAMPLE].double().t() @ c.x.double()
        check(ours()[:SAMPLE].clone(), wide, truth, f"weight gradient {c.name} {peer}")
    measure(
        "weight gradient", c.name, peer, ours if c.ours else lambda: c.dz.t() @ c.x, flops=c.flops,
        bytes_=nbytes(c.x, c.dz, main_grad, main_grad), targets=c.targets(0.70, fp32=2, fp16=40), slow=c.slow,
        paired=c.paired(lambda x, w, dz: dz.t() @ x),
    )  # fmt: skip


@pytest.mark.parametrize("peer", ["spu bf16", "torch bf16"])
def test_bf16_forward_and_backward(measure: Measure, peer: str) -> None:
    """Forward, input gradient and the fp32 main gradient; torch with its cast, unscaling, check and addition apart."""
    c = Case(LARGE, peer, "input")
    main_grad, inv_scale, found_inf = torch.zeros(c.w.shape), torch.full((1,), 0.5), torch.zeros(1)

    def ours() -> object:
        y = OPS.linear.cpu(c.x, c.w, None, "none", False)
        OPS.linear_dw_.cpu(c.dz, c.x, main_grad, inv_scale, found_inf, True)
        return y, OPS.linear_dx.cpu(c.dz, c.w)

    def plain() -> object:
        y, dx = F.linear(c.x, c.w), c.dz @ c.w
        dw = (c.dz.t() @ c.x).float()
        torch._amp_foreach_non_finite_check_and_unscale_([dw], found_inf, inv_scale)
        main_grad.add_(dw)
        return y, dx

    measure(
        "forward + backward", c.name, peer, ours if c.ours else plain, flops=3 * c.flops,
        bytes_=nbytes(c.x, c.w, c.dz, c.dz, c.w, c.x, c.x, c.dz, main_grad, main_grad), targets={"torch bf16": 1.1},
        slow=c.slow,
    )  # fmt: skip
