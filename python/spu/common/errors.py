"""Words of an error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["disk_errors", "first_line", "kind_and_line"]


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Raise the safetensors package's own error of a file that the system refused as the OSError that it hides.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: with the system's number (``ENOSPC``, ``EFBIG``, ...) and ``path``.
    """
    try:
        yield
    except Exception as error:
        # its type is no OSError, and the number is in the text alone: "I/O error: ... (os error 28)"
        number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the second where the first announces it; the type's name where
    there is none, or only a key.
    """
    name = type(error).__name__
    lines = (str(error).strip() or name).splitlines()
    text = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{name}: {text}" if isinstance(error, KeyError) else text


def kind_and_line(error: BaseException) -> str:
    """Return the type's name, a colon and ``first_line``: for an error that is passed over, and may be of any kind."""
    line = first_line(error)
    name = type(error).__name__
    return line if line == name or line.startswith(f"{name}: ") else f"{name}: {line}"
