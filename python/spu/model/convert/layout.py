"""How the tensors of a checkpoint lie in a model's parameters: equal, or as runs of elements of several of them.

Rows of a matrix are runs of its elements, so that a fused matrix (queries, keys and values in one) is a list of runs.
The same layout reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spu.common.file_memory import copy_in
from spu.common.interrupts import stop_if_asked
from spu.model.convert.shards import PIECE_BYTES, Shards

__all__ = ["Layout", "Run", "Stored", "check", "fill", "whole", "write_tensor"]


@dataclass(frozen=True)
class Run:
    """Elements of a parameter that lie side by side in a stored tensor, too.

    Attributes:
        parameter: its name in the model.
        first: the first of the elements in the parameter, flat.
        count: how many.
    """

    parameter: str
    first: int
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape, and the runs that it consists of, in order."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Layout = Mapping[str, Stored]


def whole(name: str, tensor: Tensor) -> Stored:
    """Return the layout of a parameter that is stored as it is."""
    return Stored(tuple(tensor.shape), (Run(name, 0, tensor.numel()),))


def check(layout: Layout, shards: Shards, needless: Callable[[str], bool]) -> None:
    """Check names and shapes of a checkpoint's tensors.

    Args:
        layout: of the model.
        shards: the checkpoint.
        needless: tells whether a tensor that the model has not may be there.

    Raises:
        ValueError: a tensor is missing, has another shape, or is none of the model's.
    """
    missing = [name for name in layout if name not in shards.entries]
    if missing:
        raise ValueError(f"{shards.folder} has no tensor {_some(missing)}; give the weights of the whole model")
    for name, stored in layout.items():
        entry = shards.entries[name]
        if entry.shape != stored.shape:
            raise ValueError(
                f"{entry.file}: {name} is {list(entry.shape)}, config.json asks for {list(stored.shape)}; give the "
                "config of these weights"
            )
    strange = [name for name in shards.entries if name not in layout and not needless(name)]
    if strange:
        raise ValueError(
            f"{shards.entries[strange[0]].file} has tensors that the model has not: {_some(strange)}; give the config "
            "of these weights"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + rest


@torch.no_grad()
def fill(layout: Layout, shards: Shards, tensors: Mapping[str, Tensor]) -> None:
    """Read every tensor of a checkpoint into parameters, cast to their dtypes, some MB at a time.

    Args:
        tensors: the parameters by name; what belongs to others alone is not read.

    Raises:
        ValueError: a tensor that is not floating-point, or a file that ends early.
    """
    wanted = [name for name, stored in layout.items() if any(run.parameter in tensors for run in stored.runs)]
    for name in sorted(wanted, key=lambda n: (shards.entries[n].file, shards.entries[n].start)):
        stop_if_asked()
        place = _Place(layout[name].runs, tensors)
        for _, values in shards.pieces(name):
            place.put(values)


class _Place:
    """Where the next elements of a stored tensor go."""

    def __init__(self, runs: tuple[Run, ...], tensors: Mapping[str, Tensor]) -> None:
        self._runs, self._tensors = list(runs), tensors
        self._done = 0  # of the first run

    def put(self, values: Tensor) -> None:
        while values.numel():
            run = self._runs[0]
            count = min(values.numel(), run.count - self._done)
            first = run.first + self._done
            if run.parameter in self._tensors:
                copy_in(self._tensors[run.parameter].view(-1)[first : first + count], values[:count])
            values, self._done = values[count:], self._done + count
            if self._done == run.count:
                self._runs.pop(0)
                self._done = 0


def write_tensor(stored: Stored, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the elements of a stored tensor in order, some MB at a time, on the CPU."""
    for run in stored.runs:
        flat = tensors[run.parameter].detach().reshape(-1)
        step = PIECE_BYTES // flat.dtype.itemsize
        for first in range(run.first, run.first + run.count, step):
            yield flat[first : min(first + step, run.first + run.count)].cpu()
