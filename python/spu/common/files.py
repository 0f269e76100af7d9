"""Files: written so that a crash leaves the old one or the new one, and the folder where spu remembers things."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["cache_directory", "naming", "read_object", "write_atomically", "write_json"]


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError from within a path if it has none: a full disk shows in a write, which knows no name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 to a file beside ``path``, wait until it is on the disk, and rename it to ``path``.

    The folder must exist. Processes and threads may write to one path at once: the last one to finish wins.

    Raises:
        OSError: if it cannot be written; it has ``path``, and the old file there is unchanged.
    """
    place = Path(path)
    part = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a file system that cannot be written, missing or not
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # the file beside it is nobody's business
            raise type(error)(error.errno, error.strerror, str(place)) from error
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON, as ``write_atomically`` does.

    Raises:
        OSError: as ``write_atomically``.
        TypeError: if JSON cannot hold it; nothing was written.
    """
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object that a JSON file holds; an empty one where it cannot be read, or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def cache_directory() -> Path:
    """Return the folder of measured figures and tables: ``$SPU_CACHE``, ``$XDG_CACHE_HOME/spu`` or ``~/.cache/spu``."""
    named = os.environ.get("SPU_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spu"
