"""Which kernel, which tile, which backend: tables by architecture, op, dtype and shape class. Imports no triton.

``tuned/<arch>.json`` ships with the package; ``spu tune`` writes a table of the same form for the user's own card into
the cache directory, and its entries come first. A table says where it comes from: ``"origin": "measured"`` with device,
versions and date, or ``"derived"``: reckoned from the architecture's limits (``derive.py``), never measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

_Cached = TypeVar("_Cached", bound=Callable[..., Any])
FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "tuned"
KINDS = ("tile", "persistent", "descriptor", "split", "torch")
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
PRODUCTS = (
    "linear", "linear_dx", "linear_dz_dx", "linear_dw", "gated_linear", "gated_dh", "gated_dx", "linear_ce",
)  # fmt: skip
CLASSES = ("skinny", "deep", "small", "medium", "large")
_SKINNY_ROWS = 64
_TILE = 128  # the classes count tiles of this side, whatever tile is used in the end
_SMALL_TILES, _MEDIUM_TILES, _DEEP_INNER = 128, 1024, 8192


@dataclass(frozen=True)
class Config:
    """How one product is launched.

    Attributes:
        kind: "tile" one program a tile; "persistent" a program walks over tiles; "descriptor" persistent with tensor
            descriptors (TMA, sm_90 and later); "split" the inner dimension in ``split_k`` parts, added up in order by a
            second kernel; "torch" the product by torch (cuBLAS) and our epilogue after it. ``linear_dz_dx`` applies
            its derivative as a "tile" loads its operand; before every other kind in a pass of its own.
        block_m, block_n, block_k: rows, columns and inner extent of a tile.
        group_m: rows of tiles that are walked together, for the L2 cache.
        num_warps, num_stages: Triton's.
        split_k: parts of the inner dimension, for kind "split".
        half: sums fp16 products in fp16 within an inner block (``accumulation.py``); no table asks for it.
    """

    kind: str = "tile"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    half: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r} of a configuration: use one of {', '.join(KINDS)}")
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} is {value}: tiles have powers of two from 16 on")


@dataclass(frozen=True)
class Entry:
    """One row of a table: the configuration, its time where it was measured, and for the ops that ask which backend is
    to serve a layer, the one that won and what forward and backward took by backend."""

    config: Config
    backend: str | None = None
    time_us: float | None = None
    layer_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table with its origin; ``facts`` are the device, versions and date of its measurement."""

    arch: str
    origin: str
    entries: Mapping[str, Entry]
    facts: Mapping[str, str]


def arch_name(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def shape_class(rows: int, columns: int, inner: int) -> str:
    """The class of a product [rows, inner] x [inner, columns]: one of ``CLASSES``."""
    if rows <= _SKINNY_ROWS:
        return "skinny"
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    if tiles <= _SMALL_TILES:
        return "deep" if inner >= _DEEP_INNER else "small"
    return "medium" if tiles <= _MEDIUM_TILES else "large"


def key_of(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """The row of a table: "linear/fp16/large"; ops that are no products have the class "any"."""
    name = shape_class(shape[0], shape[1], shape[2]) if op in PRODUCTS and len(shape) == 3 else "any"
    return f"{op}/{DTYPE_NAMES[dtype]}/{name}"


def read(path: Path) -> Table:
    """A table from its file.

    Raises:
        ValueError: if it is not a table of this format; the message names the file.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this spu reads {FORMAT}")
        known = {field.name for field in fields(Config)}
        entries = {}
        for key, row in data["entries"].items():
            config = Config(**{name: value for name, value in row.get("config", {}).items() if name in known})
            entries[key] = Entry(config, row.get("backend"), row.get("time_us"), row.get("layer_us", {}))
        return Table(data["arch"], data["origin"], entries, data.get("facts", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning table: {error}: write it again with `spu tune`") from error


def write(table: Table, path: Path) -> None:
    """Writes a table, sorted, so that two measurements can be compared line by line."""
    rows: dict[str, Any] = {}
    for key in sorted(table.entries):
        entry = table.entries[key]
        row: dict[str, Any] = {"config": {name: v for name, v in asdict(entry.config).items() if name != "half"}}
        if entry.backend is not None:
            row["backend"] = entry.backend
        if entry.time_us is not None:
            row["time_us"] = round(entry.time_us, 3)
        if entry.layer_us:
            row["layer_us"] = {name: round(value, 3) for name, value in entry.layer_us.items()}
        rows[key] = row
    head = {"format": FORMAT, "arch": table.arch, "origin": table.origin, "facts": dict(table.facts)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    text = json.dumps(head)[:-1] + ',\n "entries": {\n' + lines + "\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def user_path(arch: str) -> Path:
    """Where ``spu tune`` writes and the choice looks first: ``$SPU_CACHE/tuned``, else ``~/.cache/spu/tuned``."""
    root = os.environ.get("SPU_CACHE")
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spu"
    return cache / "tuned" / f"{arch}.json"


def shipped_arch(capability: tuple[int, int]) -> str:
    """The shipped table of an architecture: its own, else the nearest older one's, else the oldest."""
    known = sorted(int(path.stem.removeprefix("sm_")) for path in SHIPPED.glob("sm_*.json"))
    wanted = 10 * capability[0] + capability[1]
    return f"sm_{max((one for one in known if one <= wanted), default=known[0])}"


_FOLLOWERS: list[Callable[[], None]] = []


def follows_tables(cached: _Cached) -> _Cached:
    """Marks an lru_cache whose results depend on the tables: ``forget`` empties it."""
    _FOLLOWERS.append(cached.cache_clear)  # type: ignore[attr-defined]
    return cached


def forget() -> None:
    """Reads the tables again at the next need, as after a measurement."""
    for clear in _FOLLOWERS:
        clear()


@follows_tables
@lru_cache(maxsize=16)
def tables(capability: tuple[int, int]) -> tuple[Table, ...]:
    """The tables of an architecture: the user's own, the shipped one, the derived one for what that did not measure.

    Read once; ``forget`` reads again.
    """
    found = []
    own = user_path(arch_name(capability))
    if own.is_file():
        found.append(read(own))
    shipped = read(SHIPPED / f"{shipped_arch(capability)}.json")
    found.append(shipped)
    if shipped.origin == "measured":
        from . import derive

        found.append(derive.table(int(shipped.arch.removeprefix("sm_"))))
    return tuple(found)


def entry_of(capability: tuple[int, int], key: str) -> Entry | None:
    """The first table's row for a key, None where no table has it."""
    return next((table.entries[key] for table in tables(capability) if key in table.entries), None)


@follows_tables
@lru_cache(maxsize=4096)
def config_of(capability: tuple[int, int], op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Config:
    """The configuration of a product [rows, inner] x [inner, columns], ``shape`` = (rows, columns, inner)."""
    entry = entry_of(capability, key_of(op, dtype, shape))
    return Config() if entry is None else entry.config


def preferred_backend(capability: tuple[int, int], op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The backend that was measured fastest, None where nothing was measured."""
    if dtype not in DTYPE_NAMES:
        return None
    entry = entry_of(capability, key_of(op, dtype, shape))
    return None if entry is None else entry.backend
