"""Saved tensors of a recomputed layer: what is changed in place between saving and use is refused, as autograd does.

Autograd compares versions of the tensors that it keeps itself. Those that hooks keep it does not look at, and
torch.utils.checkpoint's hooks do not either: a gradient of other values would be the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from spu.common import torch_private

__all__ = ["SavedVersions"]


class SavedVersions:
    """The versions of a layer's saved tensors at the time of saving, by their order; the second run saves the same."""

    def __init__(self, name: str) -> None:
        self._name = name  # of the layer
        self._versions: dict[int, int] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within a checkpoint's first run: let the backward look at each tensor that the second run has saved.

        The backward raises RuntimeError for a tensor that was changed since.
        """
        hooks = torch_private.saved_tensor_hooks()
        if hooks is None:  # nothing is saved for the backward: no gradient is asked for
            yield
            return
        pack, unpack = hooks
        numbers = count()

        def used(saved: tuple[int, Any]) -> Tensor:
            number, packed = saved
            tensor = unpack(packed)  # the first time this runs the layer again
            if torch_private.version(tensor) != self._versions.get(number, torch_private.version(tensor)):
                raise RuntimeError(
                    f"layer {self._name!r} changes in place a tensor of shape {tuple(tensor.shape)} that its backward "
                    "needs, which autograd refuses without recompute too: write x = x * 2 in place of x.mul_(2), or "
                    "change a copy"
                )
            return tensor

        with saved_tensors_hooks(lambda tensor: (next(numbers), pack(tensor)), used):
            yield

    @contextmanager
    def second(self) -> Iterator[None]:
        """Within the recomputation: note what is saved."""
        hooks = torch_private.saved_tensor_hooks()
        assert hooks is not None, "torch.utils.checkpoint recomputes without hooks"
        pack, unpack = hooks
        numbers = count()

        def saved(tensor: Tensor) -> Any:
            self._versions[next(numbers)] = torch_private.version(tensor)
            return pack(tensor)  # ends the run at the last tensor

        with saved_tensors_hooks(saved, unpack):
            yield
