"""The gate of ``make aot``: what it reads from machine code, what it refuses, and launches that it refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks/aot"))

import aot_triton

from spu import kernels
from spu.kernels import ahead, derive, limits
from spu.kernels.ahead import Built
from spu.kernels.arith import INTERPRET

PRODUCT = Built("product_kernel", 86, 128, 0, 40 << 10, 128, "mma.sync", False, False, {}, 1.0, 0, 16, 16)
NARROW = (86, 89, 120)  # 99 KB of shared memory a block


def test_an_epilogue_does_not_make_the_loop_around_it_the_hottest() -> None:
    """A tie of tensor-core instructions was broken by the epilogue's fp32: walked products seemed to reach 0.3."""
    inner = "/*0010*/ HMMA.16816.F32 R4, R8, R10, R4 ;\n/*0020*/ BRA 0x0010 ;\n"
    listing = f"/*0000*/ MOV R1, R2 ;\n{inner}/*0030*/ FFMA R1, R2, R3, R4 ;\n/*0040*/ BRA 0x0000 ;\n"
    found = limits.read(listing, 86)
    assert found.mix["tensor"] == 0.5
    assert found.peak_share == 1.0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (75, 32, 64 << 10, 128, 1),  # the whole of it: the system takes none there
        (75, 32, 0, 32, 16),
        (86, 32, 0, 32, 16),
        (89, 32, 0, 32, 24),
        (80, 32, 0, 32, 32),
        (86, 32, 49 << 10, 128, 2),
        (86, 32, 50 << 10, 128, 1),  # 1 KB a block is the system's
        (120, 168, 0, 128, 3),
    ],
)
def test_blocks_that_fit_a_multiprocessor(arch: int, registers: int, shared: int, threads: int, blocks: int) -> None:
    built = dataclasses.replace(PRODUCT, arch=arch, registers=registers, shared_bytes=shared, threads=threads)
    assert built.blocks == blocks


def test_what_the_gate_refuses() -> None:
    assert aot_triton.faults(PRODUCT, "fp16 skinny") == []
    large = dataclasses.replace(PRODUCT, shared_bytes=80 << 10)
    assert aot_triton.faults(large, "fp16 skinny") == [
        "4 warps fit a multiprocessor: less than two for each of its schedulers"
    ]
    asynchronous = dataclasses.replace(large, tensor_core="wgmma.mma_async")
    assert aot_triton.faults(asynchronous, "fp16 skinny") == []
    for kept, name, label in ((512, "norm_backward_kernel", "fp32 long"), (16, "product_kernel", "fp16 large")):
        spills = dataclasses.replace(PRODUCT, name=name, spilled_bytes=kept)
        assert aot_triton.faults(spills, label) == []
        more = dataclasses.replace(spills, spilled_bytes=kept + 8)
        assert aot_triton.faults(more, label) == [f"spills {kept + 8} bytes a thread"]
    short = dataclasses.replace(PRODUCT, name="norm_backward_kernel", spilled_bytes=8)
    assert aot_triton.faults(short, "fp32") == ["spills 8 bytes a thread"], "the exception is for long rows"
    narrow = dataclasses.replace(PRODUCT, name="dequantize_kernel", tensor_core="", widest_load=8)
    assert aot_triton.faults(narrow, "fp32") == [], "int4's codes are an eighth of the values"
    assert aot_triton.faults(narrow, "fp16") == ["the widest load is of 8 bytes, 16 are possible"]
    too_large = dataclasses.replace(asynchronous, shared_bytes=100 << 10)
    assert aot_triton.faults(too_large, "fp16 skinny")[0].endswith(f"a block may have {99 << 10}")


def test_two_programs_of_four_warps_fit_a_card_of_99_kilobytes() -> None:
    """Of stages - 1 tiles in shared memory at a time. One program of 4 warps leaves a warp for each scheduler."""
    for arch in NARROW:
        for key, entry in derive.table(arch).entries.items():
            (op, dtype, _), one = key.split("/"), entry.config
            if dtype == "fp32":
                continue
            columns = one.block_n * (2 if op == "gated_linear" else 1)
            held = (one.num_stages - 1) * (one.block_m + columns) * one.block_k * 2
            wanted = 2 if one.num_warps < 8 else 1
            assert wanted * (held + 1024) <= 100 << 10, f"sm_{arch} {key}: {one}"


def test_two_programs_of_a_medium_product_fit_a_card_of_99_kilobytes() -> None:
    """A grid of one program a multiprocessor left half of its registers and shared memory empty."""
    for arch in NARROW:
        for op in ("linear", "linear_dx", "linear_dw"):
            one = derive.config(arch, op, "fp16", "medium")
            assert (one.kind, one.blocks) == (("descriptor", 2) if arch == 120 else ("tile", 1)), f"sm_{arch} {op}"
            assert derive.config(arch, op, "fp16", "large").blocks == 1
        assert derive.config(arch, "linear_dz_dx", "fp16", "medium").kind != "tile", "which applies it on load"


def tight(arch: int, call: str) -> list[str]:
    """The faults of a launch that had one."""
    half, wide = torch.float16, torch.float32
    x, w = torch.empty(64, 1024, dtype=half), torch.empty(768, 1024, dtype=half)
    with ahead.recording(arch) as kept:
        if call == "fp32":
            for codec in ("int8", "int4"):
                wire = kernels.pack(torch.empty(512, 768), codec, bytes(64))
                kernels.unpack(wire, (512, 768), wide, codec)
        elif call.endswith("skinny"):
            dtype = wide if call.startswith("fp32") else half
            kernels.gated_linear(x.to(dtype), w.to(dtype), w.to(dtype), "silu")
        else:
            rows, weight = torch.empty(8, 16384, dtype=half), torch.empty(16384, dtype=half)
            kernels.rms_norm_backward(rows, rows, rows, weight, torch.empty(8), 0.0, True, True, True)
    return [fault for one in kept for fault in aot_triton.faults(ahead.build(one, arch, listing=False), call)]


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("arch", "call"), [(75, "fp32"), (80, "fp32 skinny"), (86, "fp16 skinny"), (86, "fp16")])
def test_launches_that_did_not_fit(arch: int, call: str) -> None:
    """A wire in fp32 took two words too many on sm_75, a gated pair in fp32 four on sm_80, a skinny gated pair all
    shared memory for 4 warps on sm_86, and the gradient of a long row 16 words too many. The whole: `make aot`.
    """
    assert tight(arch, call) == []
