"""Arrays that are made once, kept in files, and read where they lie: a corpus larger than the memory.

Each set of arrays is a folder under ``cache_directory()/tokens``, named by all that it was made from. It is written
beside its place and renamed when it is whole. Any of them may be deleted; it is made again when it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from spu.common.files import cache_directory, naming, write_json

__all__ = ["Arrays", "Writer", "kept_arrays"]

_FORMAT = 1  # another one for files that this code would read wrongly
_META = "meta.json"
_OLD_S = 86_400.0  # after which a folder that nobody has finished is taken for a killed process's


class Arrays(dict[str, np.ndarray[Any, Any]]):
    """One-dimensional arrays by name, mapped from files.

    Attributes:
        meta: what their maker said of them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        known = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.meta: dict[str, Any] = known["meta"]
        for name, (dtype, count) in known["arrays"].items():
            file, kind = folder / f"{name}.bin", np.dtype(dtype)
            if file.stat().st_size != count * kind.itemsize:
                raise ValueError(f"{file} is damaged")
            # Copy on write: nothing writes into them, but torch warns of arrays that cannot be written
            self[name] = np.memmap(file, kind, mode="c", shape=(count,)) if count else np.empty(0, kind)


class Writer:
    """Appends to arrays in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[IO[bytes], np.dtype[Any]]] = {}

    def append(self, name: str, values: np.ndarray[Any, Any], dtype: Any) -> None:
        """Write ``values`` behind what the array ``name`` has, as ``dtype``."""
        if name not in self._files:
            self._files[name] = open(self._folder / f"{name}.bin", "wb"), np.dtype(dtype)  # noqa: SIM115
        file, kind = self._files[name]
        file.write(np.ascontiguousarray(values, dtype=kind).data)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write everything to the disk."""
        arrays = {}
        for name, (file, kind) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            arrays[name] = (kind.str, file.tell() // kind.itemsize)
        write_json(self._folder / _META, {"meta": dict(meta), "arrays": arrays})

    def close(self) -> None:
        """Close the files."""
        for file, _ in self._files.values():
            file.close()


def kept_arrays(made_from: Mapping[str, Any], make: Callable[[Writer], Mapping[str, Any]]) -> Arrays:
    """Return the arrays that ``make`` writes, from the cache where they are there.

    Args:
        made_from: all that they depend on, as JSON.
        make: appends to the arrays and returns what else is to be known of them, as JSON.

    Raises:
        OSError: they cannot be written.
        Exception: what ``make`` raises; nothing is left behind.
    """
    name = hashlib.sha256(json.dumps([_FORMAT, made_from], sort_keys=True).encode()).hexdigest()[:32]
    place = cache_directory() / "tokens" / name
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Arrays(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    _tidy(place)
    part = place.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with naming(place.parent), contextlib.closing(Writer(part)) as writer:
            writer.finish(make(writer))
        _put(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Arrays(place)


def _put(part: Path, place: Path) -> None:
    """Rename a whole folder to its place; where another process was faster, its folder stays."""
    try:
        os.rename(part, place)
    except OSError:
        try:
            Arrays(place)
        except (OSError, ValueError, KeyError, TypeError):  # it is damaged: make room
            shutil.rmtree(place)
            os.rename(part, place)


def _tidy(place: Path) -> None:
    """Remove what killed processes have left of these arrays."""
    for old in place.parent.glob(f".{place.name}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_S:
                shutil.rmtree(old, ignore_errors=True)
