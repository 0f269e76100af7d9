"""The tables of CPUs: for an op, dtype and class of shapes, whose matrix product serves. Filled in at the load of
``spu._C``, which looks a product up without Python.

A *way* is ``""``, the kernels of the instruction set in use; the name of a narrower one (``avx512`` where bf16's own
instruction is slow); or ``torch``: the sums by torch's fp32 product, 16-bit operands widened before it, and after it
our epilogue (bias, activation, unscaling, addition into the main gradient, the check). All three add up in fp32.
torch's products of 16-bit tensors are no way: they round the sums to 16 bits, which a main gradient must not be, and in
fp16 some add up in fp16.

Tables belong to a *family*: vendor, family and model of the processor and the instruction set in use, such as
``intel-6-85-avx512``. The user's own is written by ``spu tune`` and comes first, row by row; then the one shipped in
``tuned/``; then what is derived from the family.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spu.common.files import cache_directory, write_atomically

__all__ = [
    "CLASSES",
    "OPS",
    "SHIPPED",
    "CpuTable",
    "derived",
    "family",
    "install",
    "processor_name",
    "read",
    "tables",
    "user_path",
    "write",
]

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "tuned"
OPS = ("linear", "linear_dx", "linear_dw", "gated_linear", "gated_dx", "linear_ce")  # as in csrc/cpu/products.cpp
CLASSES = ("row", "skinny", "few", "small", "deep", "large")
_DTYPES = ("fp32", "fp16", "bf16")
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
# fp32 products that MKL is faster at, or as fast, on Intel's cores: with AVX-512, and on those that have AVX2 alone.
_MKL_WINS = {
    "linear": ("few", "small", "deep", "large"),
    "linear_dx": CLASSES,
    "linear_dw": ("skinny", "small", "deep"),
    "gated_linear": ("few", "small", "deep", "large"),
    "gated_dx": ("skinny", "few", "small", "deep", "large"),
}
_MKL_WINS_AVX2 = {**_MKL_WINS, "linear_dw": ("skinny", "small", "deep", "large")}
_MKL_WINS_AVX2_HALF = ("deep", "large")  # input gradients, although the weight is widened first
# Intel's cores with AMX: vdpbf16ps does two multiply-adds a lane there in four times the time of one in fp32.
_SLOW_DOTS = ("intel-6-143", "intel-6-173", "intel-6-174", "intel-6-207")


@dataclass(frozen=True)
class CpuTable:
    """The ways of a family by key ("linear/fp16/large"), and how it was made.

    Attributes:
        ways: way by key.
        facts: the processor, torch's version, threads and date of a measurement.
        gains: measured: the time of our kernels over the way's, for the rows whose way is not ``""``.
    """

    family: str
    ways: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)


def _processor() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def processor_name() -> str:
    """Return the processor's name as the system has it; "" where it has none."""
    return _processor().get("model name", "")


def family(isa: str) -> str | None:
    """Return the family of this processor with an instruction set in use; None where the system does not name it."""
    found = _processor()
    parts = [found.get(name) for name in ("vendor_id", "cpu family", "model")]
    if None in parts:
        return None
    vendor, *numbers = map(str, parts)
    return "-".join((_VENDORS.get(vendor, vendor.lower()), *numbers, isa))


def read(path: Path) -> CpuTable:
    """Read a table.

    Raises:
        ValueError: if it is not a table of this format; the message names the file.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this spu reads {FORMAT}")
        rows = {key: (str(row["way"]), row.get("gain")) for key, row in data["rows"].items()}
        gains = {key: float(gain) for key, (_, gain) in rows.items() if gain is not None}
        return CpuTable(data["family"], {key: way for key, (way, _) in rows.items()}, data.get("facts", {}), gains)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not a CPU's table: {error}: write it again with `spu tune`") from error


def write(table: CpuTable, path: Path) -> None:
    """Write a table, a line a row, sorted."""
    rows = {
        key: {"way": way} | ({"gain": round(table.gains[key], 3)} if key in table.gains else {})
        for key, way in sorted(table.ways.items())
    }
    head = json.dumps({"format": FORMAT, "family": table.family, "facts": dict(table.facts)})
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, head[:-1] + ',\n "rows": {\n' + lines + "\n}}\n")


def user_path(name: str) -> Path:
    """Return the file that ``spu tune`` writes for a family, ``tuned/<family>.json`` in the cache directory."""
    return cache_directory() / "tuned" / f"{name}.json"


def derived(name: str) -> CpuTable:
    """Return what a family's name alone says: on Intel's cores by torch (MKL) the products that it won there; bf16
    by fp32 products where its own instruction is slower.
    """
    ways: dict[str, str] = {}
    if name.startswith("intel-"):
        isa = name.rpartition("-")[2]
        won = {} if isa == "scalar" else _MKL_WINS_AVX2 if isa == "avx2" else _MKL_WINS
        ways |= {f"{op}/fp32/{shape}": "torch" for op, shapes in won.items() for shape in shapes}
        half = _MKL_WINS_AVX2_HALF if isa == "avx2" else ()
        ways |= {f"linear_dx/{dtype}/{shape}": "torch" for dtype in ("fp16", "bf16") for shape in half}
    if name.endswith("-avx512bf16") and name.startswith(_SLOW_DOTS):
        ways |= {f"{op}/bf16/{shape}": "avx512" for op in OPS for shape in CLASSES}
    return CpuTable(name, ways)


def tables(name: str) -> tuple[CpuTable, ...]:
    """Return a family's tables, those that come first last: derived, shipped, the user's own.

    Raises:
        ValueError: for a file that is no table, or another family's.
    """
    found = [derived(name)]
    for path in (SHIPPED / f"{name}.json", user_path(name)):
        if path.is_file():
            table = read(path)
            if table.family != name:
                raise ValueError(f"{path} was measured on {table.family}, not {name}: write it again with `spu tune`")
            found.append(table)
    return tuple(found)


def install(found: tuple[CpuTable, ...]) -> None:
    """Give the products these ways, each table's rows over those before; rows that no table has go back to ``""``.

    A way that does not serve here (an instruction set that this processor lacks, torch without MKL) is passed over.
    """
    set_way = getattr(importlib.import_module("spu._C"), "set_way", None)
    if set_way is None:  # built from sources that had no ways
        return
    ways = {f"{op}/{dtype}/{shape}": "" for op in OPS for dtype in _DTYPES for shape in CLASSES}
    for table in found:
        ways.update(table.ways)
    for key, way in ways.items():
        if way == "torch" and not torch.backends.mkl.is_available():
            way = ""
        if key.count("/") == 2:
            set_way(*key.split("/"), way)
