"""What a function finds in a tensor, found once and known while the tensor's values stand.

For what costs a look at every value, or a wait for a GPU, and is asked for by every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from spu.common.tensor_table import TensorTable
from spu.common.torch_private import version

__all__ = ["Known"]

_V = TypeVar("_V")


class Known(Generic[_V]):
    """A function of a tensor that is called once for each, and again after a change in place (by torch's count).

    A tensor is known by identity, and kept alive by nobody here; its last answer alone is kept, which may not hold the
    tensor. Threads may ask at the same time: each may find the answer then. Nothing is known of inference tensors,
    whose changes torch does not count. ``@Known`` before a function makes it one.

    Args:
        find: (tensor, what else the answer is of: values that can be compared) -> the answer.
    """

    def __init__(self, find: Callable[..., _V]) -> None:
        self._find = find
        self._rows: TensorTable[tuple[int, tuple[Any, ...], _V]] = TensorTable()

    def __call__(self, tensor: Tensor, *of: Any) -> _V:
        """Return what is known, or find it."""
        if tensor.is_inference():
            return self._find(tensor, *of)
        row = self._rows.get(tensor)
        if row is not None and row[0] == version(tensor) and row[1] == of:
            return row[2]
        seen = version(tensor)  # before the look: a change meanwhile makes the answer an old one
        found = self._find(tensor, *of)
        self._rows[tensor] = seen, of, found
        return found

    def note(self, tensor: Tensor, value: _V, *of: Any) -> None:
        """Let an answer be known that nobody has to find."""
        if not tensor.is_inference():
            self._rows[tensor] = version(tensor), of, value

    def __len__(self) -> int:
        return len(self._rows)
