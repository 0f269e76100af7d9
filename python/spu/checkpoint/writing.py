"""Checkpoints that survive a crash at any moment: a directory of tensors and metadata, replaced as one.

A checkpoint is a directory with three files: ``tensors.safetensors``, ``meta.json``, and ``manifest.json``, which holds
the size and SHA-256 of the other two, and its own. It is written beside its place and moved there:

1. everything is written to ``.NAME.spu-new`` and synced, the manifest last: a directory with a valid one is complete;
2. the checkpoint in place, if any, is renamed to ``.NAME.spu-old``;
3. ``.NAME.spu-new`` is renamed to ``NAME``, and ``.NAME.spu-old`` is deleted.

After a crash in 1 the old one is in place; between 2 and 3 nothing is, and ``load`` takes ``.NAME.spu-new``, which
is complete; after 3 the new one is in place. The next ``save`` puts back or deletes what a crash left. Saves into
one parent directory wait for each other (a lock on that directory, which dies with its process). Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from spu.checkpoint.reading import (
    CHUNK_BYTES,
    FORMAT,
    MANIFEST,
    META,
    NAMES,
    TENSORS,
    VERSION,
    CheckpointError,
    Stored,
    digest_of,
    memory,
    open_directory,
    read_manifest,
)
from spu.common.interrupts import delayed_interrupts

try:
    import fcntl
except ImportError:  # Windows: saves by several processes into one directory are not kept apart there
    fcntl = None  # type: ignore[assignment]

__all__ = ["CheckpointError", "Elsewhere", "Stored", "exists", "fingerprint", "load", "opened", "save", "settle"]


class Elsewhere(Protocol):
    """A tensor that is read when its turn has come, and let go when it is written."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> torch.Tensor:
        """Return it, dense; called once."""


def save(
    path: str | os.PathLike[str], *, tensors: Mapping[str, torch.Tensor | Elsewhere], meta: Mapping[str, Any]
) -> None:
    """Write a checkpoint at ``path``, replacing the one there only once the new one is complete and on the disk.

    Args:
        path: the checkpoint's directory; its parents are made. A checkpoint there is replaced, all else is refused.
        tensors: by name; any strides, sizes and devices. Tensors that share storage are saved once for each name.
            One that is elsewhere is read when it is written, and not kept.
        meta: what JSON can hold: dicts with text keys, lists (tuples come back as lists), text, numbers, bools, None.

    Raises:
        CheckpointError: ``path`` holds something else, which is left alone, or writing failed; the last complete
            checkpoint there still loads.
        TypeError: a tensor or a piece of metadata that cannot be saved; nothing was written.
    """
    place = Path(os.path.realpath(path))
    _check_tensors(tensors)
    meta_bytes = _meta_bytes(meta)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place.parent, exclusive=True):
            with delayed_interrupts():
                _tidy(place)
            _write(_leftovers(place)[0], tensors, meta_bytes)
            with delayed_interrupts():
                _swap(place)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: writing failed: {error}; make room or choose another path. "
            "The last complete checkpoint there, if any, still loads"
        ) from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the checkpoint at ``path``, or the one a crashed ``save`` left beside it.

    Sizes and checksums are verified before anything is returned.

    Returns:
        The tensors by name, on the CPU, contiguous, in the order they were saved in; and the metadata.

    Raises:
        CheckpointError: missing, foreign, of a newer version, truncated or changed since it was written.
    """
    with opened(path) as (stored, meta):
        return {name: tensor.read() for name, tensor in stored.items()}, meta


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Stored], dict[str, Any]]]:
    """Open what ``load`` reads, with tensors that are read when they are asked for, within ``with``.

    Everything is verified before, in a pass that keeps nothing. No save replaces the checkpoint meanwhile.

    Raises:
        CheckpointError: as ``load``.
    """
    place = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_lock(place.parent, exclusive=False))
            found = _open_one(path, place)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: reading failed: {error}; check its permissions") from error
        stack.enter_context(found[0])
        yield found[1:]


def _open_one(path: str | os.PathLike[str], place: Path) -> tuple[IO[bytes], dict[str, Stored], dict[str, Any]]:
    if place.exists():
        return open_directory(place)
    # A crash between the two renames leaves nothing in place, but one or two good ones beside it.
    for left in filter(_is_complete, _leftovers(place)):
        with contextlib.suppress(CheckpointError):
            return open_directory(left)
    raise CheckpointError(_missing(path, place))


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether ``load`` finds something at ``path``: a checkpoint, or what a crashed ``save`` left beside it."""
    place = Path(os.path.realpath(path))
    return place.exists() or any(map(_is_complete, _leftovers(place)))


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Return what tells the checkpoint that ``load`` reads at ``path`` from all others, its manifest's digest; "" where
    there is none, or one that is damaged.
    """
    place = Path(os.path.realpath(path))
    for directory in [place] if place.exists() else filter(_is_complete, _leftovers(place)):
        with contextlib.suppress(CheckpointError, OSError):
            return str(read_manifest(directory)["sha256"])
    return ""


def settle(path: str | os.PathLike[str]) -> None:
    """Put in place what a crashed ``save`` left beside it, so that ``path`` itself is what ``load`` reads.

    Raises:
        CheckpointError: something else is there.
        OSError: no rights.
    """
    place = Path(os.path.realpath(path))
    with _lock(place.parent, exclusive=True), delayed_interrupts():
        _tidy(place)


# Placing: which directory is the checkpoint, and how a new one takes its place.


def _leftovers(place: Path) -> tuple[Path, Path]:
    """Return where the new checkpoint is written, and where the old one waits to be deleted."""
    return place.with_name(f".{place.name}.spu-new"), place.with_name(f".{place.name}.spu-old")


def _is_complete(directory: Path) -> bool:
    """Return whether ``directory`` holds a manifest that is whole and files of the sizes it says."""
    try:
        manifest = read_manifest(directory)
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (OSError, CheckpointError):
        return False


def _tidy(place: Path) -> None:
    """Put back what a crashed save left if nothing is in place, delete it otherwise; refuse foreign things."""
    if not place.exists():
        left = next(filter(_is_complete, _leftovers(place)), None)
        if left is not None:
            os.replace(left, place)
            _sync_directory(place.parent)
    elif not place.is_dir() or (any(place.iterdir()) and not (place / MANIFEST).exists()):
        raise CheckpointError(f"{place} exists and is not a spu checkpoint; it was left as it is. Choose another path")
    for directory in _leftovers(place):
        if directory.exists():
            shutil.rmtree(directory)


def _swap(place: Path) -> None:
    new, old = _leftovers(place)
    had_one = place.exists()
    if had_one:
        os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        if had_one:
            os.replace(old, place)
        raise
    _sync_directory(place.parent)
    # The new one is in place and on the disk: failing to delete the old one is no failure, the next save tries again.
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the advisory lock of ``directory``, where the file system has such locks."""
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:  # missing: the caller's own access says so better
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _sync_directory(directory: Path) -> None:
    """Make renames and new names in ``directory`` durable; some systems cannot open directories, and need it not."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Writing.


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"tensor name {name!r} cannot be saved; use text other than '__metadata__'")
        if not isinstance(tensor, torch.Tensor):
            if hasattr(tensor, "read") and tensor.dtype in NAMES:
                continue
            raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor; put it in meta")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES:
            raise TypeError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be saved; "
                f"convert it to a dense tensor with data, of one of {', '.join(map(str, NAMES))}"
            )


def _meta_bytes(meta: Mapping[str, Any]) -> bytes:
    _check_meta(meta, "meta")
    return json.dumps(meta, indent=1).encode()


def _check_meta(value: Any, where: str) -> None:
    """Refuse what JSON would change without a word, or without saying where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, a {type(key).__name__}; keys are text")
            _check_meta(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_meta(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, (str, int, float, bool))):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold; convert it, or save a tensor")


def _write(directory: Path, tensors: Mapping[str, torch.Tensor | Elsewhere], meta_bytes: bytes) -> None:
    """Write and sync a complete checkpoint in ``directory``; remove it if that fails."""
    directory.mkdir()
    try:
        files = {
            TENSORS: _write_tensors(directory / TENSORS, tensors),
            META: _write_bytes(directory / META, meta_bytes),
        }
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "files": files}
        manifest["sha256"] = digest_of(manifest)
        _write_bytes(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_directory(directory)
        _sync_directory(directory.parent)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if error.errno is not None and error.filename is None:
            error.filename = str(directory)
        raise


def _write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(content)
        _sync_file(file)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync_file(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | Elsewhere]) -> dict[str, Any]:
    """Write and hash a safetensors file in one pass, with one copy at a time of tensors that need one.

    The library's own ``save_file`` takes all tensors at once, contiguous and on the CPU: those of a device would all be
    in host memory together. It cannot hash what it writes, and has no complex128.
    """
    # Wide elements first keep every tensor aligned for readers that map the file.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    spans, offset = {}, 0
    for name in order:
        end = offset + tensors[name].shape.numel() * tensors[name].dtype.itemsize
        spans[name], offset = [offset, end], end
    header = json.dumps(
        {n: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": spans[n]} for n, t in tensors.items()}
    ).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(piece: bytes | memoryview) -> None:
            file.write(piece)
            digest.update(piece)

        put(struct.pack("<Q", len(header)) + header)
        for name in order:
            own = tensors[name]
            tensor = own if isinstance(own, torch.Tensor) else own.read()
            tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            data = memory(tensor)
            for start in range(0, len(data), CHUNK_BYTES):
                put(data[start : start + CHUNK_BYTES])
        _sync_file(file)
    return {"bytes": 8 + len(header) + offset, "sha256": digest.hexdigest()}


def _missing(path: str | os.PathLike[str], place: Path) -> str:
    if not place.parent.is_dir():
        return f"no checkpoint at {path}: the folder {place.parent} does not exist; check the path"
    return f"no checkpoint at {path}; check the path, or train without --resume to make one"
