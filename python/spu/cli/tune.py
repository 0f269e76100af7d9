"""The command ``spu tune``: measure the kernels of a GPU, or of this CPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from importlib import import_module
from pathlib import Path

import torch

from spu.common.dtypes import DTYPES

__all__ = ["tune_command"]


def tune_command(
    device: str | None, ops: str | None, dtypes: str | None, minutes: float | None, out: str | None, dry: bool
) -> None:
    """Measure, or with ``dry`` print what would be measured.

    Args:
        device: "cpu" or a GPU; None: the first GPU, else the CPU.
        ops, dtypes: names between commas; None: all that are worth it there.
        minutes: stop after this time.
        out: another file than the user's table.

    Raises:
        ValueError: bad input, or nothing here that could be measured; the text names the value and the fix.
    """
    where = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if where != "cpu" and not where.startswith("cuda"):
        raise ValueError(f"--device {where}: spu tune measures cuda:0, another GPU, or cpu, which is all of it")
    if minutes is not None and not (0 < minutes < math.inf):
        raise ValueError(f"--minutes {minutes} must be a positive number")
    if out is not None and (not out or Path(out).is_dir()):
        raise ValueError(f"--out {out!r} is no file: give one to write the table to")
    path, seconds = None if out is None else Path(out), None if minutes is None else 60 * minutes
    if where == "cpu":
        from spu.ops.cpu_table import OPS
        from spu.tune import cpu

        names = _named("--ops", ops, OPS, OPS)
        kinds = _named("--dtypes", dtypes, DTYPES, ("fp16", "bf16", "fp32"))
        if dry:
            print("\n".join(cpu.plan_lines(names, kinds, import_module("spu._C").isa())))
            return
        written = cpu.tune(names, kinds, seconds=seconds, out=path)
    else:
        from spu.kernels.config import PRODUCTS
        from spu.tune import run

        names = _named("--ops", ops, PRODUCTS, PRODUCTS)
        kinds = _named("--dtypes", dtypes, DTYPES, ("fp16", "bf16"))
        if dry:
            print("\n".join(run.plan_lines(90, names, kinds)))
            return
        written = run.tune(where, names, kinds, seconds=seconds, out=path)
    print(f"written to {written}")


def _named(label: str, given: str | None, known: Collection[str], default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of an option."""
    names = default if given is None else tuple(given.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{label} {given}: there is no {unknown[0]!r}: give some of {', '.join(known)}")
    return names
