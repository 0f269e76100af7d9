"""``spu._cuda`` and the devices here: whether it has code for them, and the tiles of its matrix products.

The tiles come from a table of the same form as Triton's (``spu.kernels.table``): the user's own measurement,
``cuda_<arch>.json`` beside ``spu tune``'s table, else the derived one below. A row is a product, dtype and shape class;
its configuration names one of the two tiles that the products are compiled with (``csrc/cuda/gemm_mma.cu``), or
cuBLASLt (kind "cublaslt"). sm_90a has one tile, which serves whatever tile the table names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spu.common.dtypes import HALVES, NAMES
from spu.kernels import derive, table
from spu.kernels.config import CLASSES, PRODUCTS, Config, Entry, Table, arch_name

__all__ = [
    "FORMS",
    "candidates",
    "choose_tiles",
    "derived",
    "packed_tiles",
    "serves",
    "takes",
    "tile_table",
    "tiles",
    "uncovered",
    "wanted",
]

FORMS = ("linear", "linear_dx", "linear_dw")
_DTYPES = tuple(NAMES[dtype] for dtype in HALVES)
_ALIGNED = 8  # the tensor-core products read rows of 16 bytes


def tiles(arch: int) -> dict[str, Config]:
    """Return the tiles that products are compiled with for an architecture (80 for sm_80), by name, default first."""
    if arch == 90:
        return {"large": Config("tile", 128, 128, 64, 1, 8, 6)}
    inner, stages = (64, 4) if arch >= 80 else (32, 2)
    return {"large": Config("tile", 128, 128, 32, 8, 4, stages), "small": Config("tile", 64, 64, inner, 8, 4, stages)}


def candidates(arch: int, op: str) -> list[Config]:
    """Return the configurations that a measurement of one of ``FORMS`` has to try."""
    found = tiles(arch)
    return [*([found["large"]] if op == "linear_dw" else found.values()), Config("cublaslt")]


def derived(arch: int) -> Table:
    """Return a table without measurements: small tiles where large ones are fewer than multiprocessors, and on sm_90
    what Triton's table has by cuBLASLt.
    """
    known = tiles(arch)
    entries = {}
    for op in FORMS:
        for dtype in _DTYPES:
            for shape_class in CLASSES:
                small = "small" in known and op != "linear_dw" and shape_class not in ("medium", "large")
                elsewhere = derive.config(derive.nearest(arch), op, dtype, shape_class)
                config = elsewhere if elsewhere.kind == "cublaslt" else known["small" if small else "large"]
                entries[f"{op}/{dtype}/{shape_class}"] = Entry(config)
    return Table(f"sm_{arch}", "derived", entries, {"note": "worked out, never measured"})


def tile_table(capability: tuple[int, int]) -> Table:
    """Return the user's table for a device, else the derived one."""
    own = table.user_path(f"cuda_{arch_name(capability)}")
    return table.read(own) if own.is_file() else derived(10 * capability[0] + capability[1])


def packed_tiles(capability: tuple[int, int], trial: Mapping[str, Entry] | None = None) -> bytes:
    """Return a table as ``spu._cuda.set_tiles`` takes it: a byte for each form, dtype and class, 1 for the small tile,
    2 for cuBLASLt.

    Args:
        trial: rows that come before the table's: a measurement sets one of ``candidates`` after the other with
            ``spu._cuda.set_tiles(10 * major + minor, packed_tiles(capability, {key: Entry(config)}))``.
    """
    fallback = derived(10 * capability[0] + capability[1]).entries
    rows = {**fallback, **tile_table(capability).entries, **(trial or {})}
    keys = [f"{op}/{dtype}/{name}" for op in FORMS for dtype in _DTYPES for name in CLASSES]
    configs = [rows[key].config for key in keys]
    return bytes(2 if config.kind == "cublaslt" else int(config.block_m < 128) for config in configs)


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Tell whether a library compiled for architectures ("75;80;90a") has code for a device.

    Machine code runs on its own major version from its minor version on ("90a" on 9.0 alone); the last architecture
    is there as PTX too, for what comes later, and so are the products of sm_80.
    """
    names = architectures.split(";")
    wanted = 10 * capability[0] + capability[1]
    for name in names:
        number = int(name.rstrip("a"))
        exact = name.endswith("a") and number == wanted
        if exact or (not name.endswith("a") and number // 10 == capability[0] and number <= wanted):
            return True
    newest = max(int(name.rstrip("a")) for name in names)
    return wanted >= newest


def uncovered(architectures: str) -> list[str]:
    """Return the CUDA devices here that a library has no code for, in words."""
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not serves(architectures, capability):
            found.append(f"cuda:{index} ({arch_name(capability)})")
    return found


def wanted() -> str:
    """Return the value of SPU_CUDA_ARCHS for the devices here: for one that is none of those that the build knows, the
    nearest older one.
    """
    found = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        arch = 10 * major + minor
        found.add(min(arch, derive.nearest(arch)))
    return ";".join("90a" if arch == 90 else str(arch) for arch in sorted(found))


def takes(op: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a product of a shape (rows, columns, inner) can run on this library's tensor cores."""
    return op not in PRODUCTS or len(shape) != 3 or all(size % _ALIGNED == 0 for size in shape[1:])


def choose_tiles(module: object) -> None:
    """Tell the loaded library the tiles for each device here."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        module.set_tiles(10 * capability[0] + capability[1], packed_tiles(capability))  # type: ignore[attr-defined]
