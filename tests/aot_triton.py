"""Compiles every Triton kernel ahead of time, without a GPU, and reports what came out as JSON lines.

Run by test_triton_kernels.py in a process of its own: compiling and interpreting exclude each other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spu.kernels import codec, linear

SIZES = {"M": "i32", "N": "i32", "K": "i32"}


def linear_fwd(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    pointers = dict.fromkeys(("x", "weight", "bias", "y", "preact"), f"*{dtype}")
    strides = dict.fromkeys(("stride_xm", "stride_xk", "stride_wn", "stride_wk"), "i32")
    options = {"ACTIVATION": "gelu", "HAS_BIAS": True, "KEEP_PREACT": True, "BM": 64, "BN": 64, "BK": 32}
    return linear._linear_fwd_kernel, {**pointers, **SIZES, **strides}, options


def linear_dw(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    pointers = {"dz": f"*{dtype}", "x": f"*{dtype}", **dict.fromkeys(("main_grad", "inv_scale", "found_inf"), "*fp32")}
    strides = dict.fromkeys(("stride_dm", "stride_dn", "stride_xm", "stride_xk"), "i32")
    return (
        linear._linear_dw_kernel,
        {**pointers, **SIZES, **strides},
        {"ACCUMULATE": True, "BN": 64, "BK": 64, "BM": 32},
    )


def quantize(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    signature = {"x": f"*{dtype}", "scales": "*fp32", "payload": "*i8", "numel": "i64", "blocks": "i64"}
    return codec._quantize_int8_kernel, signature, {"PER": codec.BLOCKS_PER_PROGRAM}


def dequantize(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    signature = {"scales": "*fp32", "payload": "*i8", "out": f"*{dtype}", "numel": "i64"}
    return codec._dequantize_int8_kernel, signature, {"SIZE": codec.CONVERT_SIZE}


def convert(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    signature = {"source": "*fp32", "target": f"*{dtype}", "numel": "i64", "target_numel": "i64"}
    return codec._convert_kernel, signature, {"SIZE": codec.CONVERT_SIZE}


def stack_bytes(cubin: bytes) -> int:
    """Local memory a thread uses; anything but 0 is a spill."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage.stdout))


def main(capabilities: list[int]) -> None:
    for make in (linear_fwd, linear_dw, quantize, dequantize, convert):
        for dtype in ("fp16", "bf16"):
            kernel, signature, constants = make(dtype)
            launch = linear.LAUNCH if "linear" in make.__name__ else codec.LAUNCH
            for capability in capabilities:
                source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
                built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch))
                ptx = built.asm["ptx"]
                row = {
                    "kernel": make.__name__,
                    "dtype": dtype,
                    "sm": capability,
                    "shared_bytes": built.metadata.shared,
                    "stack_bytes": stack_bytes(built.asm["cubin"]),
                    "tensor_core": next((name for name in ("wgmma", "mma.sync") if name in ptx), None),
                    "contracted": "fma.rn.f32" in ptx,  # enable_fp_fusion=False must have reached the compiler
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
