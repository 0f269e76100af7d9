"""The CUDA library's own table: which of its tiles, or cuBLASLt, serves a form of product, dtype and shape class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spu.common.dtypes import DTYPES, HALVES
from spu.kernels import table
from spu.kernels.config import Config, Entry, Table, arch_name
from spu.ops import cuda_library
from spu.tune.calls import REPRESENTATIVE
from spu.tune.timing import context_is_gone, measure_us

__all__ = ["choose_tiles", "product_of"]


def product_of(op: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """Return one of ``cuda_library.FORMS`` of a shape (rows, columns, inner) as a call of the CUDA library's op."""
    m, n, k = shape

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    ops: Any = torch.ops.spu
    if op == "linear":
        x, w, bias = random(m, k), random(n, k), random(n)
        return lambda: ops.linear.cuda(x, w, bias, "gelu", True)
    if op == "linear_dx":
        dz, weight = random(m, k), random(k, n)
        return lambda: ops.linear_dx.cuda(dz, weight)
    left, right = random(k, m), random(k, n)  # rows and columns are the weight's, inner the tokens
    main, one, found = torch.zeros(m, n, device=device), torch.ones(1, device=device), torch.zeros(1, device=device)
    return lambda: ops.linear_dw_.cuda(left, right, main, one, found, True)


def choose_tiles(
    module: Any,
    path: Path,
    dtype: str,
    shape_class: str,
    device: torch.device,
    facts: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Time every choice for each form of product that ``path``, a table, has no time for; write the fastest ones there
    and let the library use them.

    Args:
        module: ``spu._cuda``.
        facts: of the measurement: the device, versions, date.
    """
    if DTYPES[dtype] not in HALVES:  # fp32 has one kernel
        return
    capability = torch.cuda.get_device_capability(device)
    arch = 10 * capability[0] + capability[1]
    made = table.read(path) if path.is_file() else Table(arch_name(capability), "measured", {}, facts)
    entries = dict(made.entries) if _same(made.facts, facts) else {}
    for op in cuda_library.FORMS:
        key = f"{op}/{dtype}/{shape_class}"
        if key in entries and entries[key].time_us is not None:
            continue
        call = product_of(op, DTYPES[dtype], REPRESENTATIVE[shape_class], device)
        times: dict[Config, float] = {}
        for config in _choices(module, arch, op):
            module.set_tiles(arch, cuda_library.packed_tiles(capability, {**entries, key: Entry(config)}))
            try:
                times[config] = measure_us(call, device)
            except Exception as error:
                if context_is_gone(error, device):
                    raise
                say(f"  cuda {config.kind}: {type(error).__name__}: {error}")
        if times:
            best = min(times, key=times.__getitem__)
            entries[key] = Entry(best, "cuda", times[best])
            table.write(dataclasses.replace(made, entries=entries, facts=facts), path)
            told = ", ".join(f"{_name(config)} {us:.1f} us" for config, us in times.items())
            say(f"{key} of CUDA C++: {told}: {_name(best)}")
    module.set_tiles(arch, cuda_library.packed_tiles(capability, entries))


def _choices(module: Any, arch: int, op: str) -> list[Config]:
    found = cuda_library.candidates(arch, op)
    has_library = isinstance(module.cublaslt(), int)
    return [config for config in found if has_library or config.kind != "cublaslt"]


def _name(config: Config) -> str:
    return "cublaslt" if config.kind == "cublaslt" else f"{config.block_m}x{config.block_n}"


def _same(earlier: Mapping[str, str], facts: Mapping[str, str]) -> bool:
    return all(earlier.get(key) == facts[key] for key in ("device", "torch", "spu"))
