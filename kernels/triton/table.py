"""The tables of an architecture: configurations by op, dtype and shape class. Imports no triton.

``spu tune`` writes a measured table for the user's own GPU into the cache directory, and its entries come first. A
table that is measured for everybody is shipped as ``tuned/<arch>.json``. ``derive.py`` makes what is in neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from spu.common.files import cache_directory, write_atomically
from spu.kernels import derive
from spu.kernels.config import DTYPE_NAMES, Config, Entry, Table, arch_name, key_of

_Cached = TypeVar("_Cached", bound=Callable[..., Any])
FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "tuned"


def read(path: Path) -> Table:
    """Read a table.

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
    """Write a table, sorted, so that two measurements can be compared line by line."""
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
    write_atomically(path, text)


def user_path(arch: str) -> Path:
    """Return the file that ``spu tune`` writes and that is read first, ``tuned/<arch>.json`` in the cache directory."""
    return cache_directory() / "tuned" / f"{arch}.json"


_FOLLOWERS: list[Callable[[], None]] = []


def follows_tables(cached: _Cached) -> _Cached:
    """Mark an lru_cache whose results depend on the tables: ``forget`` empties it."""
    _FOLLOWERS.append(cached.cache_clear)  # type: ignore[attr-defined]
    return cached


def forget() -> None:
    """Make the tables be read from disk at the next need, as after a measurement."""
    for clear in _FOLLOWERS:
        clear()


@follows_tables
@lru_cache(maxsize=16)
def tables(capability: tuple[int, int]) -> tuple[Table, ...]:
    """Return an architecture's tables: the user's own, the shipped one, the derived one, as far as they exist.

    Read once; ``forget`` reads again. An architecture that spu does not know has the tables of the nearest older one.
    """
    arch = derive.nearest(10 * capability[0] + capability[1])
    measured = (user_path(arch_name(capability)), SHIPPED / f"sm_{arch}.json")
    return (*(read(path) for path in measured if path.is_file()), derive.table(arch))


def entry_of(capability: tuple[int, int], key: str) -> Entry | None:
    """Return the first table's row for a key, None where no table has it."""
    return next((table.entries[key] for table in tables(capability) if key in table.entries), None)


@follows_tables
@lru_cache(maxsize=4096)
def config_of(capability: tuple[int, int], op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Config:
    """Return the configuration of a product [rows, inner] x [inner, columns], ``shape`` = (rows, columns, inner)."""
    entry = entry_of(capability, key_of(op, dtype, shape))
    return Config() if entry is None else entry.config


def preferred_backend(capability: tuple[int, int], op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Return the backend that was measured fastest, None where nothing was measured."""
    if dtype not in DTYPE_NAMES:
        return None
    entry = entry_of(capability, key_of(op, dtype, shape))
    return None if entry is None else entry.backend
