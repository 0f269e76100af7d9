"""Words of an error."""

from __future__ import annotations

__all__ = ["first_line"]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the second where the first announces it; the type's name where
    there is none, or only a key.
    """
    name = type(error).__name__
    lines = (str(error).strip() or name).splitlines()
    text = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{name}: {text}" if isinstance(error, KeyError) else text
