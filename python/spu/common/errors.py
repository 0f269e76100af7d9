"""Words of an error."""

from __future__ import annotations

__all__ = ["first_line", "kind_and_line"]


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
