"""The safetensors files of a model's folder: their headers, and the bytes of their tensors in pieces.

A file is 8 bytes with the header's length (little-endian), a JSON header that gives each tensor a dtype, a shape and
the range of its bytes, and the bytes (https://huggingface.co/docs/safetensors). Pieces are read with ordinary reads
instead of a mapping, so what is read never counts as the process's memory for longer than a piece is in use.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spu.common.files import naming
from spu.common.raw import bytes_of

__all__ = ["DTYPE_NAMES", "INDEX", "PIECE_BYTES", "SINGLE", "Entry", "Shards", "write_shard"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 16 << 20
_MOST_HEADER_BYTES = 100 << 20  # as in safetensors itself

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is.

    Attributes:
        name: of the tensor.
        file: that holds it.
        dtype: as safetensors calls it ("BF16").
        shape: its sizes.
        start: of its bytes in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Shards:
    """All tensors of a model's folder, by name.

    Args:
        folder: with `model.safetensors`, or an index and its shards, or shards alone.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file, or names files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}  # of each file, by name
        self.weight_map: dict[str, str] | None = None  # of the index
        if (folder / INDEX).is_file():
            self.weight_map = _weight_map(folder / INDEX)
            files = sorted(set(self.weight_map.values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            files = sorted(f.name for f in folder.glob("*.safetensors") if not f.name.startswith("adapter_"))
        for name in files:
            self._add(folder / name)
        for tensor, name in (self.weight_map or {}).items():
            if tensor not in self.entries or self.entries[tensor].file.name != name:
                raise ValueError(f"{folder / name} has no tensor {tensor!r}, which {INDEX} says; copy both again")

    def _add(self, file: Path) -> None:
        header, data = _header(file)
        self.metadata[file.name] = header.pop("__metadata__", {})
        size = file.stat().st_size
        for name, value in header.items():
            entry, end = _entry(file, name, value, data)
            if end > size:
                raise ValueError(f"{file} is truncated: {size} bytes of {end} ({name}); copy it again")
            if name in self.entries:
                raise ValueError(f"{file} and {self.entries[name].file.name} both have {name!r}; remove one of them")
            self.entries[name] = entry

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a floating-point tensor flat in pieces, as (first element, values); values live until the next one.

        Raises:
            ValueError: of another dtype, or the file ends early.
        """
        entry = self.entries[name]
        if entry.dtype not in _FLOATS:
            raise ValueError(
                f"{entry.file}: {name} is {entry.dtype}, not F32, F16, BF16 or F64; give weights that are not quantised"
            )
        dtype, count = _FLOATS[entry.dtype], math.prod(entry.shape)
        most = PIECE_BYTES // dtype.itemsize
        buffer = bytearray(min(count, most) * dtype.itemsize)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for first in range(0, count, most):
                number = min(most, count - first)
                part = memoryview(buffer)[: number * dtype.itemsize]
                _read_into(file, part, entry)
                yield first, torch.frombuffer(part, dtype=dtype)


def _read_into(file: Any, part: memoryview, entry: Entry) -> None:
    while part:
        done = file.readinto(part)
        if not done:
            raise ValueError(f"{entry.file} is truncated: it ends within {entry.name}; copy it again")
        part = part[done:]


def _weight_map(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(tensor): str(name) for tensor, name in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no index of safetensors (a JSON object with weight_map); copy it again") from error
    for name in sorted(set(pairs.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{file} names {name!r}, which is no file in its folder; name files beside it alone")
        if not (file.parent / name).is_file():
            raise ValueError(f"{file.parent / name} is missing, which {file.name} names; copy it there too")
    return pairs


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and where its data begins."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"{file} is truncated or no safetensors file ({size} bytes); copy it again")
        text = opened.read(length) if length <= _MOST_HEADER_BYTES else b""
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no safetensors file: its header is no JSON object; copy it again") from error
    return header, 8 + length


def _entry(file: Path, name: str, value: Any, data: int) -> tuple[Entry, int]:
    """Return a tensor's entry, and where its bytes end in the file."""
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and start <= end
        if dtype in _BYTES:
            sound = sound and end - start == math.prod(shape) * _BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: the header's entry of {name!r} is damaged; copy the file again")
    return Entry(name, file, str(dtype), shape, data + start), data + end


def write_shard(
    file: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    pieces: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file piece by piece, as the safetensors package does: the same bytes, and no copy of them.

    The file has another name until it is whole.

    Args:
        file: to write.
        tensors: (name, shape) of each, in their order in the file.
        dtype: to store them in.
        pieces: yields a tensor's values, flat and in order.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(f".{file.name}.part")
    try:
        with naming(file), part.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name, _ in tensors:
                for values in pieces(name):
                    opened.write(bytes_of(values.to(dtype)).numpy().data)
            if opened.tell() != 8 + len(text) + end:
                raise AssertionError(f"{file}: {opened.tell()} bytes written of {8 + len(text) + end}")
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
