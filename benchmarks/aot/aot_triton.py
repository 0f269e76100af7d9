"""Compile every Triton kernel in every configuration of the tables, without a device; refuse what would run badly.

``python benchmarks/aot/aot_triton.py --arch 80 90`` prints one JSON line a kernel and ends with 1 if any breaks a rule:
no spills (but for the named exceptions), shared memory within what a block may have, two warps or more a scheduler and
tensor-core instructions in 16-bit products, 16-byte accesses where memory is the limit, as many blocks a multiprocessor
as a persistent grid has, contraction as asked for. ``--markdown FILE`` writes the page;
``--sample`` compiles a few of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton_page
from torch import Tensor

from spu.common.files import write_json
from spu.kernels import ahead, codec, cross_entropy, finish, gated, limits, linear, mlp, norm, optim, rows, table
from spu.kernels.ahead import Built, Launch
from spu.kernels.config import CLASSES, DTYPE_NAMES, PRODUCTS, Config
from spu.kernels.derive import ARCHITECTURES, SHARED_BYTES, of_triton
from spu.kernels.launch import ACTIVATIONS, for_alignment

_M, _N, _K = 512, 768, 1024  # multiples of every tile; kernels do not depend on sizes beyond their divisibility
_RAGGED = ("skinny", "medium", "large")  # classes that are compiled for ragged shapes as well, in fp16
_REGISTERS = 65536  # of a multiprocessor
_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32)
_PRODUCTS = ("product_kernel", "descriptor_kernel", "gated_linear_kernel", "gated_linear_descriptor_kernel",
             "gated_dh_kernel", "gated_dh_descriptor_kernel", "gated_dx_kernel", "gated_dx_descriptor_kernel",
             "mlp_dz_kernel", "mlp_dz_descriptor_kernel", "linear_ce_kernel", "linear_ce_dz_kernel")  # fmt: skip
_SAMPLE_LISTED = ("product_kernel", "descriptor_kernel", "linear_ce_kernel")
_LEAST_WARPS = 8  # of a product that waits for its tensor cores: two a scheduler
_LONG_ROWS = (8192, norm.LARGEST_ROW)  # what takes the most registers is the longest row of each number of warps
# (kernel, or kernel and label; architecture or 0 for all): how many bytes of stack are accepted there, and why.
EXCEPTIONS: dict[tuple[str, int], tuple[int, str]] = {
    ("product_kernel", 0): (16, "up to four words, put away before the loop and taken back after it"),
    ("descriptor_kernel", 100): (48, "with fp16 accumulation alone, from which these cards gain nothing"),
    ("gated_dx_kernel", 100): (8, "two words, of skinny tiles"),
    ("gated_linear_kernel", 80): (8, "two words, with Triton 3.6 of fp16's large tile"),
    ("gated_linear_kernel", 90): (8, "two words, of fp32's tile; none with Triton 3.6"),
    ("gated_dx_kernel", 120): (8, "two words, of fp32's skinny tile"),
    ("linear_ce_kernel", 90): (24, "up to six words, where it stores its logits; with Triton 3.6 two"),
    ("linear_ce_kernel", 100): (8, "two words, of the small tile where it stores no logits"),
    ("linear_ce_dz_kernel", 120): (8, "two words, of fp32's skinny tile"),
    ("linear_ce_kernel", 120): (8, "two words, of the skinny tile where it stores its logits, and of the small one"),
    ("norm_backward_kernel fp16 long", 0): (128, "LayerNorm's, of rows of 16,384, which need three sums at once"),
    ("norm_backward_kernel fp32 long", 0): (512, "rows of 16,384 in fp32, of which no known model is trained"),
}

_FUSED = ("quantize_kernel",)  # in which the fused multiply-adds are written as such
# Kernels (or kernel and label) that memory limits: the bytes of their widest load and store at least, where addresses
# and sizes allow it.
_ACCESSES = {
    "adamw_kernel": (16, 16), "square_sum_kernel": (16, 0), "dz_kernel": (16, 16), "finish_kernel": (16, 8),
    "gated_dz_kernel": (16, 16), "mlp_finish_kernel": (16, 16), "column_sum_kernel": (16, 0),
    "logits_ce_kernel": (16, 0), "logits_dz_kernel": (16, 16), "convert_kernel": (16, 16), "quantize_kernel": (16, 16),
    "dequantize_kernel": (16, 16), "dequantize_kernel fp32": (8, 16),  # int4's codes: a ninth of what it moves
    "norm_kernel": (16, 16), "norm_backward_kernel": (16, 16), "rotary_kernel": (8, 8),
}  # fmt: skip


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _linear(dtype: torch.dtype, configs: dict[str, Config], sample: bool) -> None:
    """``sample``: not the forms that are parts of others here, or that the ragged ones are compiled in."""
    x, w, b, dz = (
        _empty(_M, _K, dtype=dtype), _empty(_N, _K, dtype=dtype), _empty(_N, dtype=dtype), _empty(_M, _N, dtype=dtype)
    )  # fmt: skip
    main, bias, one = _empty(_N, _K), _empty(_N), _empty(1)
    forward, dx, dw = configs["linear"], configs["linear_dx"], configs["linear_dw"]
    if forward.kind != "torch":
        linear.linear_fwd(x, w, b, "gelu", True, config=forward)
        if dtype == torch.float16:
            how = (None, "none", False) if sample else (b, "gelu", True)
            linear.linear_fwd(x, w, *how, config=dataclasses.replace(forward, half=True))
        if not sample:
            linear.linear_fwd(x, w, None, "none", False, config=forward)
        linear.linear_dx(dz, w, config=dx)
        linear.linear_dz_dx(dz, dz, w, "gelu", config=configs["linear_dz_dx"])
        linear.linear_dw(dz, x, config=dw)
        for accumulate in (True,) if sample else (False, True):
            linear.linear_dw_(dz, x, main, one, one, accumulate, bias, config=dw)
    if configs["gated_linear"].kind != "torch":
        gated.gated_linear(x, w, w, "silu", config=configs["gated_linear"])
        gated.gated_dh(x, w.t().contiguous(), dz, dz, "silu", config=configs["gated_dh"])
        gated.gated_dx(dz, dz, w, w, config=configs["gated_dx"])
        mlp.mlp_dz(x, w.t().contiguous(), dz, "gelu", True, True, configs["mlp_dz"])
        target, rows = torch.empty(_M, dtype=torch.int64), _empty(_M)
        if not sample:
            cross_entropy.linear_ce(x, w, target, -100, config=configs["linear_ce"])
        cross_entropy.linear_ce_dz(x, w, target, rows, rows, -100, config=configs["linear_ce"])
        cross_entropy.linear_ce_and_dz(x, w, target, rows, _empty(_M, _N), -100, config=configs["linear_ce"])


def _ragged(configs: dict[str, Config]) -> None:
    """Sizes and strides that are multiples of nothing: no descriptors, masks in the loop, narrow loads."""
    m, n, k = _M - 3, _N - 5, _K - 3
    x, w, wide, dz = (_empty(*size, dtype=torch.float16) for size in ((m, k), (n, k), (k, n), (m, n)))
    one, bias = _empty(1), _empty(n, dtype=torch.float16)
    configs = {op: for_alignment(config, torch.float16, (k, n)) for op, config in configs.items()}
    linear.linear_fwd(x, w, bias, "silu", True, config=configs["linear"])
    linear.linear_dz_dx(dz, dz, w, "gelu_tanh", config=configs["linear_dz_dx"])
    linear.linear_dw_(dz, x, _empty(n, k), one, one, True, _empty(n), config=configs["linear_dw"])
    gated.gated_linear(x, w, w, "gelu_tanh", keep=False, config=configs["gated_linear"])
    gated.gated_dh(x, wide, dz, dz, "gelu_tanh", config=configs["gated_dh"])
    gated.gated_dx(dz, dz, w, w, config=configs["gated_dx"])
    mlp.mlp_dz(x, wide, dz, "gelu_tanh", True, True, configs["mlp_dz"])
    target, rows = torch.empty(m, dtype=torch.int64), _empty(m)
    cross_entropy.linear_ce(x, w, target, -100, config=configs["linear_ce"])
    cross_entropy.linear_ce_dz(x, w, target, rows, rows, -100, config=configs["linear_ce"])


def _pointwise(dtype: torch.dtype, sample: bool) -> None:
    x, one = _empty(_M, _N, dtype=dtype), _empty(1)
    for activation in ("gelu",) if sample else ACTIVATIONS[1:]:
        linear.linear_dz(x, x, activation)
        finish.finish(x, x, activation=activation, preact=x)
    for activation in ("silu",) if sample else ("silu", "gelu", "gelu_tanh"):
        gated.gated_dz(x, x, x, activation)
        mlp.mlp_dz(
            _empty(_M, 16, dtype=dtype), _empty(16, _N, dtype=dtype), x, activation, True, False, Config("torch")
        )
    linear.linear_db(x)
    linear.linear_db_(x, _empty(_N), one, one, True)
    linear.unscale_(x, _empty(_M, _N), one, one, False)
    target = torch.empty(_M, dtype=torch.int64)
    as_torch = Config("torch")
    cross_entropy.linear_ce(_empty(_M, 16, dtype=dtype), _empty(_N, 16, dtype=dtype), target, -100, as_torch)
    rows = _empty(_M)
    operands = _empty(_M, 16, dtype=dtype), _empty(_N, 16, dtype=dtype)
    cross_entropy.linear_ce_dz(*operands, target, rows, rows, -100, as_torch)
    for name in ("int8", "int4") if sample else codec.FORMATS:
        codec.pack(x, name, bytes(codec.HEADER_BYTES))
        _, scales, payload = codec.sections(x.numel(), name)
        wire = torch.empty(codec.HEADER_BYTES + scales + payload, dtype=torch.uint8)
        codec.unpack(wire, x.shape, dtype, name)
    _by_row(x, one)
    wide = _empty(_M, _N)
    masters = [wide] if dtype in _HALVES else []
    params = [x] if masters else [wide]
    optim.adamw_(params, [wide], masters, [wide], [wide], [one], one, one, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    optim.grad_sqnorm([wide])


def _by_row(x: Tensor, one: Tensor) -> None:
    """Norms with and without what they may lack, an embedding's gradient, rotary positions."""
    weight, by_row, ids = _empty(_N, dtype=x.dtype), _empty(_M), torch.empty(_M, dtype=torch.int64)
    norm.rms_norm(x, None, weight, 1e-6, 0.0, True)
    norm.rms_norm(x, x, weight, 1e-6, 1.0, False)
    norm.rms_norm_backward(x, None, x, weight, by_row, 0.0, True, True, True)
    norm.rms_norm_backward(x, x, x, weight, by_row, 1.0, False, True, True)
    norm.layer_norm(x, None, weight, weight, 1e-5)
    norm.layer_norm_backward(x, None, x, weight, by_row, by_row, True, True, True)
    for accumulate in (False, True):
        rows.embedding_dw_(x, ids, -1, _empty(1024, _N), one, one, accumulate)
    heads, angles = _empty(2, 64, 8, 128, dtype=x.dtype).transpose(1, 2), _empty(1, 64, 128, dtype=x.dtype)
    for interleaved, inverse in ((False, False), (False, True), (True, False), (True, True)):
        rows.rotary(heads, heads, angles, angles, interleaved, inverse)


def _long(dtype: torch.dtype) -> None:
    """Rows and heads as large as large models have them: a program holds them whole."""
    for cols in _LONG_ROWS:
        x, weight, by_row = _empty(64, cols, dtype=dtype), _empty(cols, dtype=dtype), _empty(64)
        norm.rms_norm(x, x, weight, 1e-6, 0.0, True)
        norm.rms_norm_backward(x, x, x, weight, by_row, 0.0, True, True, True)
        norm.layer_norm(x, x, weight, weight, 1e-5)
        norm.layer_norm_backward(x, x, x, weight, by_row, by_row, True, True, True)
    heads, angles = _empty(2, 64, 64, 128, dtype=dtype).transpose(1, 2), _empty(1, 64, 128, dtype=dtype)
    for interleaved in (False, True):
        rows.rotary(heads, heads, angles, angles, interleaved, False)


def launches(arch: int, sample: bool = False) -> dict[Launch, str]:
    """Every launch of an architecture with a label; ``sample``: large shapes in fp16 and few pointwise kernels."""
    found: dict[Launch, str] = {}
    capability = divmod(arch, 10)
    for dtype in _HALVES[:1] if sample else _DTYPES:
        with ahead.recording(arch) as kept:
            _pointwise(dtype, sample)
        found |= {launch: DTYPE_NAMES[dtype] for launch in kept if launch not in found}
        if not sample and dtype != torch.bfloat16:  # which is fp16 with other roundings
            with ahead.recording(arch) as kept:
                _long(dtype)
            found |= {launch: f"{DTYPE_NAMES[dtype]} long" for launch in kept if launch not in found}
        for shape_class in ("large",) if sample else CLASSES:
            configs = {op: _row(capability, op, dtype, shape_class) for op in PRODUCTS}
            with ahead.recording(arch) as kept:
                _linear(dtype, configs, sample)
            label = f"{DTYPE_NAMES[dtype]} {shape_class}"
            found |= {launch: label for launch in kept if launch not in found}
            if dtype == torch.float16 and shape_class in _RAGGED and configs["linear"].kind != "torch":
                with ahead.recording(arch) as kept:
                    _ragged(configs)
                found |= {launch: f"{label} ragged" for launch in kept if launch not in found}
    return found


def _row(capability: tuple[int, int], op: str, dtype: torch.dtype, shape_class: str) -> Config:
    entry = table.entry_of(capability, f"{op}/{DTYPE_NAMES[dtype]}/{shape_class}")
    if entry is not None and entry.config.kind == "cublaslt":  # the kernel that serves when a measurement says so
        return of_triton(10 * capability[0] + capability[1], op, DTYPE_NAMES[dtype], shape_class)
    return Config() if entry is None else entry.config


def faults(built: Built, label: str, most_registers: int = 0) -> list[str]:
    """Which rules a compiled kernel breaks. ``most_registers``: a thread's limit, if several blocks are to fit."""
    found = []
    cases = ((name, arch) for name in (built.name, f"{built.name} {label}") for arch in (built.arch, 0))
    excused = max(EXCEPTIONS.get(case, (0, ""))[0] for case in cases)
    if built.spilled_bytes > excused:
        found.append(f"spills {built.spilled_bytes} bytes a thread")
    if built.shared_bytes > SHARED_BYTES[built.arch]:
        found.append(f"{built.shared_bytes} bytes of shared memory, a block may have {SHARED_BYTES[built.arch]}")
    wanted = _REGISTERS // (most_registers * built.threads) if most_registers else 1
    if built.blocks < wanted:
        found.append(f"{built.blocks} blocks fit a multiprocessor, its persistent grid has {wanted}")
    warps = built.resident // 32
    if built.name in _PRODUCTS and built.tensor_core in ("", "mma.sync") and warps < _LEAST_WARPS:
        found.append(f"{warps} warps fit a multiprocessor: less than two for each of its schedulers")
    wide = label.startswith("fp32")
    if built.name in _PRODUCTS and not wide and not built.tensor_core:
        found.append("a 16-bit product without tensor-core instructions")
    if built.contracted and not (built.name in _PRODUCTS and wide) and built.name not in _FUSED:
        found.append("multiplications and additions were fused")
    accesses = _ACCESSES.get(f"{built.name} {label}", _ACCESSES.get(built.name, (0, 0)))
    accesses = (0, 0) if label.endswith("ragged") else accesses  # odd sizes allow none
    for what, widest, least in zip(("load", "store"), (built.widest_load, built.widest_store), accesses, strict=True):
        if widest < least:
            found.append(f"the widest {what} is of {widest} bytes, {least} are possible")
    return found


def _build(task: tuple[int, int, bool, Path | None]) -> dict[str, Any]:
    """Compiles launch number ``task[1]`` of an architecture; in a process of its own, which lists them again."""
    arch, index, sample, cache = task
    launch, label = _listed(arch, sample)[index]
    options = dict(launch.options)
    flags = {key: value for key, value in launch.constants if isinstance(value, (str, bool))}
    row: dict[str, Any] = {"label": label, "flags": {k: str(v) for k, v in flags.items() if v not in (False, "none")}}
    row["stages"] = options.get("num_stages", 0)
    row["tile"] = [value for key, value in launch.constants if key in ("BM", "BN", "BK")]
    try:
        # What other types differ in is roundings, or no tensor cores. Listing is half of a kernel's time: of a sample,
        # one product that ends as it is and one that goes on with its tile.
        listed = [other.name for other, its in _listed(arch, sample)[:index] if its == label]
        chosen = label == "fp16 large" and launch.name in _SAMPLE_LISTED and launch.name not in listed
        listing = chosen if sample else label.startswith("fp16")
        built = _remembered(launch, arch, cache, listing)
    except Exception as error:  # the compiler's own: reported, and the gate fails
        return row | {"name": launch.name, "arch": arch, "faults": [f"{type(error).__name__}: {error}"]}
    shares = {"occupancy": round(built.occupancy, 2), "bytes_in_flight": built.bytes_in_flight}
    return row | asdict(built) | shares | {"faults": faults(built, label, options.get("maxnreg") or 0)}


def _remembered(launch: Launch, arch: int, cache: Path | None, listing: bool) -> Built:
    """``ahead.build``, or what it found in an earlier run of the same kernel source, compiler and reader."""
    if cache is None:
        return ahead.build(launch, arch, listing)
    readers = "".join(Path(str(module.__file__)).read_text() for module in (ahead, limits))
    what = (launch.kernel.cache_key, launch.key, launch.options, arch, listing, readers)
    file = cache / f"{hashlib.sha256(repr((triton.__version__, what)).encode()).hexdigest()}.json"
    if file.exists():
        return Built(**json.loads(file.read_text()))
    built = ahead.build(launch, arch, listing)
    cache.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(built))
    return built


_LISTS: dict[tuple[int, bool], list[tuple[Launch, str]]] = {}


def _listed(arch: int, sample: bool) -> list[tuple[Launch, str]]:
    if (arch, sample) not in _LISTS:
        _LISTS[arch, sample] = list(launches(arch, sample).items())
    return _LISTS[arch, sample]


def rows_of(
    archs: list[int], sample: bool, jobs: int, cache: Path | None, dtypes: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """One row a kernel and architecture, as they are compiled."""
    tasks = [
        (arch, index, sample, cache)
        for arch in archs
        for index, (_, label) in enumerate(_listed(arch, sample))
        if label.split()[0] in dtypes
    ]
    if jobs == 1:
        yield from map(_build, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_build, tasks, chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Compile all Triton kernels ahead of time and check them.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--sample", action="store_true", help="one dtype and two shape classes")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPE_NAMES.values()), help="default: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="remember what was compiled there; a run that was cut off goes on")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args(arguments)
    rows = []
    dtypes = tuple(options.dtypes or DTYPE_NAMES.values())
    for row in rows_of(options.arch, options.sample, options.jobs, options.cache, dtypes):
        rows.append(row)
        print(json.dumps(row), flush=True)
    bad = [row for row in rows if row["faults"]]
    for row in bad:
        print(f"sm_{row['arch']} {row['name']} ({row['label']}): {'; '.join(row['faults'])}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled for {len(options.arch)} architectures, {len(bad)} refused", file=sys.stderr)
    if options.markdown is not None:
        options.markdown.write_text(triton_page.markdown(rows, EXCEPTIONS, dtypes))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
