"""The table of what must be reached: its rows of linear layers, beside plain torch in turns.

``make bench ARGS="-k goals"`` measures the table alone: these rows, and, where files and tests are marked ``goals``,
the decoder's step, the main job's and that of all ops. Where torch's 16-bit products take seconds (no instructions of
their own), it has fewer rows, and is compared by the time of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Ceilings, ratio_in_turns, seconds_of
from must_reach import MUST_REACH
from torch import Tensor

import spu.ops  # noqa: F401  (defines torch.ops.spu)

pytest.importorskip("spu._C", reason="spu._C is not built here")

OPS = torch.ops.spu
# tokens, in, out: attention and MLP of decoders of width 512 and 1024, and a square one of 2048
SHAPES = [(512, 512, 512), (512, 512, 1408), (512, 1408, 512), (512, 1024, 4096), (512, 2048, 2048)]
SLOW_ROWS, SLOW_SECONDS = 16, 0.05

Call = Callable[[], object]


def layer(rows: int, inner: int, out: int, dtype: torch.dtype, by_torch: bool) -> Call:
    """Forward, input gradient, and the weight's added to an fp32 main gradient; torch with its cast, unscaling, check
    and addition apart.
    """
    torch.manual_seed(0)
    x, dz = torch.randn(rows, inner).to(dtype), torch.randn(rows, out).to(dtype)
    w = (torch.randn(out, inner) / inner**0.5).to(dtype)
    main_grad, inv_scale, found_inf = torch.zeros(out, inner), torch.full((1,), 0.5), torch.zeros(1)

    def ours() -> object:
        y = OPS.linear.cpu(x, w, None, "none", False)[0]
        OPS.linear_dw_.cpu(dz, x, main_grad, inv_scale, found_inf, True)
        return y, OPS.linear_dx.cpu(dz, w)

    def plain() -> object:
        y, dx = F.linear(x, w), dz @ w
        dw = (dz.t() @ x).float()
        torch._amp_foreach_non_finite_check_and_unscale_([dw], found_inf, inv_scale)
        main_grad.add_(dw)
        return y, dx

    return plain if by_torch else ours


def beside(shape: tuple[int, int, int], dtype: torch.dtype, peer: torch.dtype) -> float:
    """The peer's time over ours; by the row where a few rows of the peer take long already."""
    rows, inner, out = shape
    few = layer(SLOW_ROWS, inner, out, peer, by_torch=True)
    few()
    slow = seconds_of(few) > SLOW_SECONDS
    plain = few if slow else layer(rows, inner, out, peer, by_torch=True)
    return ratio_in_turns(layer(rows, inner, out, dtype, by_torch=False), plain) * (rows / SLOW_ROWS if slow else 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_layers(ceilings: Ceilings, shape: tuple[int, int, int]) -> None:
    name = "x".join(map(str, shape))
    half, brain = torch.float16, torch.bfloat16
    what = "linear into main_grad, beside torch"
    MUST_REACH.add(f"bf16 {what} bf16 with cast, unscale, add", beside(shape, brain, brain), name)
    MUST_REACH.add(f"fp16 {what} fp16 the same way", beside(shape, half, half), name)
    MUST_REACH.add(f"fp16 {what} fp32", beside(shape, half, torch.float32), name)


def product_error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4])
def test_error_of_fp16_gradients(size: float) -> None:
    """The weight gradient of scaled gradients of a size: our largest error and torch fp16's, to fp64's product."""
    torch.manual_seed(0)
    x, dz = torch.randn(64, 256).half(), (torch.randn(64, 128) * size).half()
    main_grad, found_inf = torch.zeros(128, 256), torch.zeros(1)
    OPS.linear_dw_.cpu(dz, x, main_grad, torch.ones(1), found_inf, False)
    truth, plain = dz.double().t() @ x.double(), dz.t() @ x
    torchs = product_error(plain.float().nan_to_num(posinf=65504.0, neginf=-65504.0), truth)
    ours = max(product_error(main_grad, truth), torch.finfo(torch.float32).tiny)
    MUST_REACH.add("fp16 split: torch fp16's error over ours, gradients of 1e-7 to 1e4", torchs / ours, f"{size:g}")
