"""``spu tune``: measures the kernels' configurations on this card and keeps the best in the user's own table.

For every product, dtype and shape class the derived configurations and their neighbours are timed on one representative
shape, beside cuBLAS with our epilogue; the fastest goes into ``spu.kernels.table.user_path`` with the device, versions
and date. The table is written after every row, so that a run that is cut off keeps what it has measured, and a later
run goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from spu import __version__
from spu.kernels import table
from spu.kernels.derive import SHARED_BYTES
from spu.kernels.table import CLASSES, PRODUCTS, Config, Entry, Table

__all__ = ["REPRESENTATIVE", "candidates", "plan_lines", "tune"]

# rows, columns, inner of the shape that stands for its class
REPRESENTATIVE = {
    "skinny": (16, 4096, 4096),
    "deep": (1024, 1024, 16384),
    "small": (512, 2048, 2048),
    "medium": (2048, 4096, 4096),
    "large": (8192, 8192, 4096),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# rows, columns, inner, warps, stages
_TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
_SKINNY_TILES = ((64, 64, 64, 4, 4), (32, 64, 128, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 4))
_FP32_TILES = ((64, 64, 32, 8, 2), (128, 64, 16, 8, 2), (32, 64, 32, 4, 2))
_SPLITS = (4, 8)
_WARM_UP, _ROUNDS, _ROUND_SECONDS = 3, 5, 0.02


def candidates(op: str, dtype: torch.dtype, shape_class: str, arch: int) -> list[Config]:
    """The configurations to try: tiles that fit the shared memory, in the kinds that the op and card know.

    Args:
        arch: 80 for sm_80.
    """
    found = [Config("torch")]
    if arch < 80:
        return found
    wide = dtype == torch.float32
    for tile in _FP32_TILES if wide else _SKINNY_TILES if shape_class == "skinny" else _TILES:
        rows, columns, inner, warps, stages = tile
        config = Config("tile", rows, columns, inner, 8, warps, stages)
        two_accumulators_fit = op != "gated_linear" or rows * columns <= 128 * 128
        if two_accumulators_fit and _shared_bytes(op, config, dtype) <= SHARED_BYTES[_known(arch)]:
            found += _kinds(op, config, shape_class, arch, wide)
    return found


def _known(arch: int) -> int:
    return max(known for known in SHARED_BYTES if known <= arch)


def _shared_bytes(op: str, tile: Config, dtype: torch.dtype) -> int:
    operands = tile.block_m + tile.block_n * (2 if op == "gated_linear" else 1)
    return operands * tile.block_k * dtype.itemsize * tile.num_stages


def _kinds(op: str, tile: Config, shape_class: str, arch: int, wide: bool) -> list[Config]:
    kinds = [tile]
    if op in ("linear", "linear_dx", "linear_dw"):
        if shape_class in ("skinny", "deep"):
            kinds += [dataclasses.replace(tile, kind="split", split_k=parts) for parts in _SPLITS]
        else:
            kinds.append(dataclasses.replace(tile, kind="descriptor" if arch >= 90 and not wide else "persistent"))
    return kinds


def _rows(ops: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    for dtype in dtypes:
        for op in ops:
            for shape_class in CLASSES:
                yield op, dtype, shape_class


def plan_lines(arch: int, ops: tuple[str, ...] = PRODUCTS, dtypes: tuple[str, ...] = ("fp16", "bf16")) -> list[str]:
    """What a run would measure, a line a row; measures nothing."""
    lines = []
    for op, dtype, shape_class in _rows(ops, dtypes):
        count = len(candidates(op, DTYPES[dtype], shape_class, arch))
        m, n, k = REPRESENTATIVE[shape_class]
        lines.append(f"{op}/{dtype}/{shape_class}: {count} configurations at {m} x {n} x {k}")
    return lines


def _call(op: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> Callable[[Config], object]:
    """The op at one shape (rows, columns, inner), as a function of its configuration."""
    from spu import kernels

    m, n, k = shape

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    left, right, bias = random(m, k), random(n, k), random(n)
    if op == "linear":
        return lambda config: kernels.linear_fwd(left, right, bias, "gelu", True, config=config)
    if op == "linear_dx":
        weight = right.t().contiguous()
        return lambda config: kernels.linear_dx(left, weight, config=config)
    if op == "linear_dz_dx":
        weight, saved = right.t().contiguous(), random(m, k)
        return lambda config: kernels.linear_dz_dx(left, saved, weight, "gelu", config=config)
    if op == "linear_dw":  # rows and columns are the weight's, inner the tokens
        dz, x = left.t().contiguous(), right.t().contiguous()
        main, one, found = torch.zeros(m, n, device=device), torch.ones(1, device=device), torch.zeros(1, device=device)
        return lambda config: kernels.linear_dw_(dz, x, main, one, found, True, config=config)
    if op == "gated_linear":
        up = right.flip(0)
        return lambda config: kernels.gated_linear(left, right, up, "silu", config=config)
    if op == "gated_dx":
        weight = right.t().contiguous()
        return lambda config: kernels.gated_dx(left, left, weight, weight, config=config)
    target = torch.randint(0, n, (m,), device=device)
    return lambda config: kernels.linear_ce(left, right, target, -100, config=config)


def measure_us(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call on the device in microseconds, by events around rounds of calls, after a warm-up."""
    for _ in range(_WARM_UP):
        function()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    calls = max(1, min(1000, int(_ROUND_SECONDS / max(time.perf_counter() - began, 1e-6))))
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def _best(op: str, dtype: str, shape_class: str, device: torch.device, arch: int) -> tuple[Entry, list[str]]:
    """The fastest configuration of a row and what was said of those that failed."""
    call, best, notes = _call(op, DTYPES[dtype], REPRESENTATIVE[shape_class], device), None, []
    for config in candidates(op, DTYPES[dtype], shape_class, arch):
        try:
            took = measure_us(lambda config=config: call(config), device)  # type: ignore[misc]
        except Exception as error:  # a configuration that does not fit is no candidate; anything else is said
            if isinstance(error, torch.AcceleratorError):
                raise
            notes.append(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if best is None or best.time_us is None or took < best.time_us:
            best = Entry(config, "triton", took)
    assert best is not None, f"no configuration of {op} {dtype} {shape_class} ran: {notes}"
    return best, notes


def _facts(device: torch.device) -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "spu": __version__,
        "date": datetime.date.today().isoformat(),
    }


def tune(
    device: str = "cuda:0",
    ops: tuple[str, ...] = PRODUCTS,
    dtypes: tuple[str, ...] = ("fp16", "bf16"),
    *,
    out: Path | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measures and writes the user's table; returns its path.

    Args:
        device: which card.
        ops: of ``spu.kernels.table.PRODUCTS``.
        dtypes: of fp16, bf16, fp32.
        out: another file than the user's table.
        seconds: stop after this time, between two rows.
        say: takes a line for every row.

    Raises:
        ValueError: without a CUDA device, or for an unknown op or dtype.
    """
    unknown = [name for name in ops if name not in PRODUCTS] + [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown {unknown}: ops are {', '.join(PRODUCTS)}, dtypes {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise ValueError("spu tune measures a CUDA device and torch sees none: see `spu doctor`")
    where = torch.device(device)
    capability = torch.cuda.get_device_capability(where)
    name, facts = table.arch_name(capability), _facts(where)
    path = out or table.user_path(name)
    entries = dict(_kept(path, facts))
    began = time.monotonic()
    for op, dtype, shape_class in _rows(ops, dtypes):
        key = f"{op}/{dtype}/{shape_class}"
        if key in entries and entries[key].time_us is not None:
            continue
        if seconds is not None and time.monotonic() - began > seconds:
            say(f"stopped after {seconds:.0f} s; run again to go on")
            break
        entries[key], notes = _best(op, dtype, shape_class, where, 10 * capability[0] + capability[1])
        table.write(Table(name, "measured", entries, facts), path)
        config = entries[key].config
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        say(f"{key}: {entries[key].time_us:.1f} us with {config.kind} {tile}")
        for note in notes:
            say(note)
    table.tables.cache_clear()
    table.config_of.cache_clear()
    return path


def _kept(path: Path, facts: dict[str, str]) -> dict[str, Entry]:
    """The rows of an earlier run on the same device with the same versions."""
    if not path.is_file():
        return {}
    earlier = table.read(path)
    same = all(earlier.facts.get(key) == facts[key] for key in ("device", "torch", "triton", "spu"))
    return dict(earlier.entries) if same else {}
