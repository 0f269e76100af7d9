"""AdamW's step with its state in every form: the share of the copy ceiling, and the same work by others.

``pip install bitsandbytes`` adds its 8-bit AdamW, which is plain torch operations on a CPU and keeps no fp32 master.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from conftest import Measure

from spu.optim.adamw import AdamW
from spu.optim.forms import FORMS
from spu.plan.memory import STATE_BYTES

pytest.importorskip("spu._C", reason="spu._C is not built here")

PARAMETERS = 1 << 23
TARGETS = {
    "fp32": {"ceiling": 0.85, "torch fused": 1.5},
    "exact": {"ceiling": 0.7, "torch fused": 1.5, "bitsandbytes": 3.0},
}


def made(dtype: torch.dtype) -> torch.nn.Parameter:
    param = torch.nn.Parameter((0.02 * torch.randn(PARAMETERS)).to(dtype))
    param.grad_dtype = torch.float32
    param.grad = 1e-3 * torch.randn(PARAMETERS)
    return param


def ours(state: str, dtype: torch.dtype) -> Callable[[], object]:
    optimizer = AdamW([made(dtype)], lr=1e-5, **FORMS[state])
    clip, found_inf = torch.full((1,), 0.5), torch.zeros(1)
    return lambda: optimizer.step(grad_scale=clip, found_inf=found_inf)


def torch_fused() -> Callable[[], object]:
    """GradScaler's unscaling and check, the step on fp32 masters, the 16-bit copy."""
    master = made(torch.float32)
    param = master.detach().half()
    optimizer = torch.optim.AdamW([master], lr=1e-5, fused=True)
    one, found = torch.ones(1), torch.zeros(1)

    def step() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_([master.grad], found, one)
        optimizer.step()
        param.copy_(master.detach())

    return step


def bitsandbytes() -> Callable[[], object]:
    import bitsandbytes

    param = torch.nn.Parameter(0.02 * torch.randn(PARAMETERS))
    param.grad = 1e-3 * torch.randn(PARAMETERS)
    optimizer = bitsandbytes.optim.AdamW8bit([param], lr=1e-5)
    return optimizer.step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", list(FORMS))
def test_step(measure: Measure, state: str, dtype: torch.dtype) -> None:
    """Gradients are read; the state is read and written, and so is the weight: the fp32 form reads it too."""
    paired = {"torch fused": torch_fused()}
    if importlib.util.find_spec("bitsandbytes"):
        paired["bitsandbytes"] = bitsandbytes()
    name = str(dtype).removeprefix("torch.")
    moved = 4 + 2 * (sum(STATE_BYTES[state]) + 2)
    measure(
        f"AdamW, state {state}", f"{PARAMETERS} {name}", "spu", ours(state, dtype), bytes_=moved * PARAMETERS,
        intensity=40 / moved, targets=TARGETS.get(state), paired=paired,
    )  # fmt: skip
