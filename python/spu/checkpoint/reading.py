"""Reading a checkpoint's directory: its manifest, its metadata, and its tensors one by one.

The file of tensors is a safetensors file. That library's reader is not used: it maps the file, and what was read stays
in this process's memory until it is closed (271 MB for eight tensors of 32 MB read one after the other, version 0.8;
34 MB here); and it has no complex128.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

__all__ = [
    "CHUNK_BYTES",
    "DTYPES",
    "NAMES",
    "CheckpointError",
    "Stored",
    "damaged",
    "digest_of",
    "memory",
    "open_directory",
    "read_manifest",
]

FORMAT, VERSION = "spu-checkpoint", 1
TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
CHUNK_BYTES = 1 << 24
_MAX_HEADER_BYTES = 1 << 28

DTYPES: dict[str, torch.dtype] = {
    "C128": torch.complex128,  # of no use to other readers: the format has names for the others only
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


@dataclass(frozen=True)
class Stored:
    """A tensor of an open checkpoint that is still on the disk."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: IO[bytes]
    offset: int

    def read(self) -> torch.Tensor:
        """Return the tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: it cannot be read any more.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        data = memory(tensor)
        try:
            self.file.seek(self.offset)
            for start in range(0, len(data), CHUNK_BYTES):
                piece = data[start : start + CHUNK_BYTES]
                if self.file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise CheckpointError(damaged(Path(self.file.name), f"it ends within tensor {self.name!r}"))
        except OSError as error:
            raise CheckpointError(f"{self.file.name}: reading tensor {self.name!r} failed: {error}") from error
        return tensor


def open_directory(directory: Path) -> tuple[IO[bytes], dict[str, Stored], dict[str, Any]]:
    """Verify a checkpoint's sizes and checksums; return its open file of tensors, the tensors in it, the metadata.

    Raises:
        CheckpointError: foreign, of a newer version, truncated or changed since it was written.
    """
    manifest = read_manifest(directory)
    meta = json.loads(_read_checked(directory / META, manifest))
    path = directory / TENSORS
    size, digest = _check_size(path, manifest), hashlib.sha256()
    file = open(path, "rb")  # noqa: SIM115  (it is closed by who reads the tensors)
    try:
        header = _read_header(path, file, digest, size)
        start = file.tell()
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
        _check_digest(path, manifest, digest.hexdigest())
    except BaseException:
        file.close()
        raise
    return file, {name: _stored(name, entry, file, start) for name, entry in header.items()}, meta


def _stored(name: str, entry: Mapping[str, Any], file: IO[bytes], start: int) -> Stored:
    return Stored(name, torch.Size(entry["shape"]), DTYPES[entry["dtype"]], file, start + entry["data_offsets"][0])


def read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir() or not path.exists():
        raise CheckpointError(f"{directory} is not a spu checkpoint: it has no {MANIFEST}; give one that spu saved")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        raise CheckpointError(damaged(path, "it is not valid JSON")) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a spu checkpoint; give a folder that spu saved")
    if manifest.get("sha256") != digest_of(manifest):
        raise CheckpointError(damaged(path, "its checksum does not match"))
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest['version']}, this spu reads {VERSION}; install the spu that wrote it"
        )
    return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damaged(path: Path, what: str) -> str:
    return f"{path} is damaged: {what}; use another checkpoint, or restore this one from a copy"


def _check_size(path: Path, manifest: Mapping[str, Any]) -> int:
    expected = int(manifest["files"][path.name]["bytes"])
    if not path.exists():
        raise CheckpointError(damaged(path, "the file is missing"))
    size = path.stat().st_size
    if size != expected:
        raise CheckpointError(damaged(path, f"it has {size} bytes, {expected} were written"))
    return expected


def _check_digest(path: Path, manifest: Mapping[str, Any], digest: str) -> None:
    if digest != manifest["files"][path.name]["sha256"]:
        raise CheckpointError(damaged(path, "its checksum does not match"))


def _read_checked(path: Path, manifest: Mapping[str, Any]) -> bytes:
    _check_size(path, manifest)
    content = path.read_bytes()
    _check_digest(path, manifest, hashlib.sha256(content).hexdigest())
    return content


def _read_header(path: Path, file: IO[bytes], digest: Any, size: int) -> dict[str, Any]:
    """Return the header, checked far enough that reading by it is safe even if it was damaged."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(damaged(path, "its header does not fit in it"))
    text = file.read(length)
    digest.update(start + text)
    try:
        header = json.loads(text)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        sizes = {n: DTYPES[e["dtype"]].itemsize * torch.Size(e["shape"]).numel() for n, e in header.items()}
        offset = 0
        for begin, end, name in spans:
            if begin != offset or end - begin != sizes[name] or min(header[name]["shape"], default=0) < 0:
                raise ValueError(name)
            offset = end
        if offset != size - 8 - length:
            raise ValueError("end")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise CheckpointError(damaged(path, "its header makes no sense")) from None
    return header


def memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied; valid while the tensor lives."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
