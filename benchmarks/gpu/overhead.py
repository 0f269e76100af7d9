"""What a launcher costs on the host: microseconds a call with the launch itself stubbed. Needs triton, no device.

    python benchmarks/gpu/overhead.py [--json FILE]

The target is under 30 us a call. Measured on CPU tensors: what is left out is Triton's own launch, what is put in is
everything of ours (checks, table, cached plan, allocation of the outputs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from spu import kernels

LIMIT_US = 30.0
_CALLS, _ROUNDS = 500, 9


def calls() -> dict[str, Callable[[], object]]:
    """One call of every launcher, at a small size: the cost does not depend on it."""
    x, w, b = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.randn(64).half()
    main, bias, one, zero = torch.zeros(64, 64), torch.zeros(64), torch.ones(1), torch.zeros(1)
    target, rows, header = torch.zeros(64, dtype=torch.int64), torch.zeros(64), bytes(64)
    wire = kernels.pack(x, "int8", header)
    state = ([x], [main], [main.clone()], [main.clone()], [main.clone()], [one])
    return {
        "linear_fwd": lambda: kernels.linear_fwd(x, w, b, "gelu", True),
        "linear_dx": lambda: kernels.linear_dx(x, w),
        "linear_dz": lambda: kernels.linear_dz(x, x, "gelu"),
        "linear_dw_": lambda: kernels.linear_dw_(x, x, main, one, zero, True, bias),
        "linear_db_": lambda: kernels.linear_db_(x, bias, one, zero, True),
        "unscale_": lambda: kernels.unscale_(x, main, one, zero, True),
        "gated_linear": lambda: kernels.gated_linear(x, w, w, "silu"),
        "gated_dz": lambda: kernels.gated_dz(x, x, x, "silu"),
        "gated_dx": lambda: kernels.gated_dx(x, x, w, w),
        "linear_ce": lambda: kernels.linear_ce(x, w, target, -100),
        "linear_ce_dz": lambda: kernels.linear_ce_dz(x, w, target, rows, rows, -100),
        "pack int8": lambda: kernels.pack(x, "int8", header),
        "unpack int8": lambda: kernels.unpack(wire, (64, 64), torch.float16, "int8"),
        "adamw_ of 1": lambda: kernels.adamw_(*state, one, zero, 1e-3, 0.9, 0.999, 1e-8, 0.1),
        "grad_sqnorm of 1": lambda: kernels.grad_sqnorm([main]),
    }


def microseconds(function: Callable[[], object]) -> float:
    """The median over rounds of the mean time of a call."""
    for _ in range(50):
        function()
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(_CALLS):
            function()
        rounds.append(1e6 * (time.perf_counter() - began) / _CALLS)
    return statistics.median(rounds)


def measure() -> dict[str, float]:
    """Microseconds a call by launcher, with every launch stubbed."""

    def stub(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        return None

    original = JITFunction.run
    JITFunction.run = stub
    try:
        return {name: round(microseconds(function), 2) for name, function in calls().items()}
    finally:
        JITFunction.run = original


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of the launchers.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    for name, took in found.items():
        print(f"{name:18} {took:7.1f} us{'' if took < LIMIT_US else f'  over {LIMIT_US:.0f}'}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
