"""Tensors that share memory: a change of one in place changes the other, and autograd must see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spu.common import torch_private

__all__ = ["View", "memory_of", "overlapping", "share_memory", "views_among"]


@dataclass(frozen=True)
class View:
    """How a tensor of a list lies in another one's memory.

    Attributes:
        of: the other one's index.
        size, stride: the tensor's own.
        offset: of its first element in the other one's memory, in elements.
        base_stride: the other one's, by which the offset counts.
        is_base: it is the other one, once more.
        requires_grad: the tensor does.
    """

    of: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    base_stride: tuple[int, ...]
    is_base: bool
    requires_grad: bool

    def on(self, base: Tensor) -> Tensor:
        """Return the view of ``base``, which has the other tensor's values."""
        if self.is_base:
            return base
        if not self.requires_grad:
            base = base.detach()
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


def memory_of(tensor: Any) -> int | None:
    """Return a key of the tensor's memory; None for an empty tensor, or an object that is no plain tensor."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or type(tensor).__torch_dispatch__ is not _PLAIN
    ):
        return None
    return tensor.untyped_storage().data_ptr() or None


_PLAIN = Tensor.__torch_dispatch__


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether some element of one may be an element of the other."""
    memory = memory_of(a)
    if memory is None or memory != memory_of(b):
        return False
    (a_first, a_end), (b_first, b_end) = _bytes(a), _bytes(b)
    return a_first < b_end and b_first < a_end


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return the indices of two different tensors with elements in common, or None.

    Tensors with gaps, which may lie between one another, and stand-ins of one element are not looked at.
    """
    groups: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        memory = memory_of(tensor)
        if memory is not None and tensor.numel() and _dense(tensor):
            groups.setdefault(memory, []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: _bytes(tensors[index]))
        for before, after in pairwise(group):
            if tensors[before] is not tensors[after] and share_memory(tensors[before], tensors[after]):
                return min(before, after), max(before, after)
    return None


def views_among(leaves: Sequence[Any]) -> dict[int, View]:
    """Return the tensors that are views of another one in the list, by index."""
    groups: dict[int, list[int]] = {}
    for index, leaf in enumerate(leaves):
        memory = memory_of(leaf)
        if memory is not None:
            groups.setdefault(memory, []).append(index)
    return {i: view for group in groups.values() if len(group) > 1 for i, view in _views(leaves, group).items()}


def _views(leaves: Sequence[Tensor], group: list[int]) -> dict[int, View]:
    found: dict[int, View] = {}
    bases: list[int] = []
    # Tensors that require a gradient, and the largest, come first: the others are views of them.
    for index in sorted(group, key=lambda i: (not leaves[i].requires_grad, -leaves[i].numel(), i)):
        leaf = leaves[index]
        base = next((b for b in bases if _within(leaf, leaves[b])), None)
        if base is None:
            bases.append(index)
            continue
        other = leaves[base]
        same = leaf.requires_grad == other.requires_grad and leaf.shape == other.shape
        found[index] = View(
            base,
            tuple(leaf.size()),
            tuple(leaf.stride()),
            int(leaf.storage_offset()) - int(other.storage_offset()),
            tuple(other.stride()),
            leaf is other or (same and leaf.stride() == other.stride() and leaf.data_ptr() == other.data_ptr()),
            leaf.requires_grad,
        )
    return found


def _within(leaf: Tensor, base: Tensor) -> bool:
    """Tell whether every element of ``leaf`` is one of ``base``, so that it can be rebuilt as a view."""
    if leaf is base:
        return True
    if leaf.requires_grad and not _related(leaf, base):
        return False
    alike = leaf.dtype == base.dtype and leaf.is_conj() == base.is_conj() and leaf.is_neg() == base.is_neg()
    if not alike or not _dense(base):
        return False
    (first, end), (base_first, base_end) = _bytes(leaf), _bytes(base)
    return base_first <= first and end <= base_end


def _related(a: Tensor, b: Tensor) -> bool:
    """Tell whether autograd knows that they share memory: a gradient of one is then one of the other."""
    ours, theirs = torch_private.view_base(a), torch_private.view_base(b)
    return (a if ours is None else ours) is (b if theirs is None else theirs)


def _dense(tensor: Tensor) -> bool:
    """Tell whether the tensor has every element between its first and its last, each once."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of the storage that the tensor uses, and the byte after its last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    first = int(tensor.storage_offset()) * tensor.element_size()
    return first, first + span * tensor.element_size()
