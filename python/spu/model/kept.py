"""The input of a layer that is recomputed, from its first run until the backward: in memory, or parked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spu.common import torch_private
from spu.common.torch_private import pytree
from spu.model.aliases import memory_of, views_among
from spu.ops.cut import cut

__all__ = ["Kept", "Park", "Parked"]


class Parked(Protocol):
    """Tensors that wait elsewhere."""

    def tensors(self) -> list[Tensor]:
        """Return new tensors with the values, shapes, dtypes and strides of the parked ones, on their device."""


class Park(Protocol):
    """Takes tensors away until they are needed again."""

    def __call__(self, tensors: Sequence[Tensor], exact: Sequence[bool], staying_bytes: int) -> Parked | None:
        """Park tensors, all or none.

        Args:
            tensors: plain, strided, no element twice, not empty; perhaps none.
            exact: for each, whether it must come back bit for bit; the others may come back packed.
            staying_bytes: bytes of the same input that cannot be parked, for the record.

        Returns:
            What brings them back; None: there is no place for them.
        """


class Kept:
    """A layer's input as it is now, from which equal ones can be made.

    Args:
        tree: the input, a pytree.
        clone: copy its tensors: the layer may change them in place.
    """

    def __init__(self, tree: Any, *, clone: bool) -> None:
        self._leaves, self._spec = pytree.tree_flatten(tree)
        self._views = views_among(self._leaves)
        self._cloned = clone
        self._plain = [type(leaf) is Tensor and not _is_fixed(leaf) for leaf in self._leaves]
        self._needs_grad = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self._leaves]
        self._tensors: dict[int, Tensor] = {}
        for index, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                self._leaves[index] = None
                if index not in self._views:
                    self._tensors[index] = leaf.detach().clone() if clone else leaf
        self._versions = {index: torch_private.version(tensor) for index, tensor in self._tensors.items()}
        self._places: list[int] = []
        self._parked: Parked | None = None
        self._probes: dict[int, Tensor] = {}

    def made(self) -> Any:
        """Return a structure with these values. A new tensor requires a gradient if it did, and is no leaf.

        Raises:
            RuntimeError: the input has been changed in place since, by other code that holds it.
        """
        present = dict(self._tensors)
        if not self._cloned:
            self._check()
        if self._parked is not None:
            present.update(zip(self._places, self._parked.tensors(), strict=True))
        leaves = list(self._leaves)
        for index, tensor in present.items():
            if index in self._tensors and not self._cloned:
                leaves[index] = tensor
            else:
                new = tensor.clone() if index in self._tensors else tensor
                leaves[index] = cut(new)[0] if self._needs_grad[index] else new
        for index, view in self._views.items():
            leaves[index] = view.on(leaves[view.of])
        return pytree.tree_unflatten(leaves, self._spec)

    def park(self, park: Park, output: Any) -> None:
        """Give the tensors that may leave to ``park``: not those that are held for others anyway.

        Args:
            park: takes them.
            output: the layer's. Without a gradient there is no backward, and so nothing to park for.
        """
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not any(leaf.requires_grad for leaf in outputs):
            return
        handed_on = {memory_of(leaf) for leaf in outputs} - {None}
        places = [index for index in self._tensors if self._may_leave(index, handed_on)]
        staying = sum(_bytes(t) for i, t in self._tensors.items() if i not in places and self._is_value(i))
        tensors = [self._tensors[index].detach() for index in places]
        self._parked = park(tensors, [not self._needs_grad[index] for index in places], staying)
        if self._parked is not None:
            self._places = places
            for index in places:
                self._probes[index] = _probe(self._tensors.pop(index))

    def _may_leave(self, index: int, handed_on: set[int | None]) -> bool:
        tensor = self._tensors[index]
        memory = memory_of(tensor)
        if memory is None or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not _distinct(tensor):
            return False
        if self._cloned:  # nobody else holds the copy
            return self._plain[index] or not self._needs_grad[index]
        return self._plain[index] and self._is_value(index) and memory not in handed_on

    def _is_value(self, index: int) -> bool:
        """Tell a value from a mask or a position, which whole models share."""
        return self._tensors[index].is_floating_point() or self._tensors[index].is_complex()

    def _check(self) -> None:
        """Refuse what autograd refuses of a tensor that it has saved; a copy to a GPU's host may also be under way."""
        for index, tensor in (*self._tensors.items(), *self._probes.items()):
            if torch_private.version(tensor) != self._versions[index]:
                raise RuntimeError(
                    "the input of a layer that is recomputed was changed in place after the layer had run, by code "
                    "that holds it too: change a copy (x.clone()), or train with recompute=False"
                )


def _probe(tensor: Tensor) -> Tensor:
    """Return a tensor without memory that shares the version counter of this one."""
    probe = tensor.detach()
    probe.data = tensor.new_empty(0)
    return probe


def _is_fixed(tensor: Tensor) -> bool:
    """Tell whether the memory is a parameter's."""
    base = torch_private.view_base(tensor)
    return tensor.requires_grad and (tensor if base is None else base).is_leaf


def _distinct(tensor: Tensor) -> bool:
    """Tell whether no two elements lie at one place, as those of an expanded tensor do."""
    end = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride <= end:
            return False
        end += (size - 1) * stride
    return True


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0
