"""A second name for a checkpoint, which takes no room: its files are hard links where the disk has them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["keep_copy"]


def keep_copy(checkpoint: Path, target: Path) -> None:
    """Make ``target`` a checkpoint of the same content; a crash leaves it whole or absent.

    A checkpoint's files are never changed, only replaced by others, so a link to them stays what it was.

    Args:
        checkpoint: complete, and not replaced meanwhile.
        target: replaced if it is there; beside it a folder ``.NAME.new`` may be left by a crash.

    Raises:
        OSError: no room, or no rights.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(checkpoint, new, copy_function=_link)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(new, target)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
