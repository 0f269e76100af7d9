"""The message from a stage to the next: its output's tensors, each memory once, and how to rebuild the output.

Plain autograd sees one tensor where a layer returns it twice, or together with a view of it; cut one by one these would
have gradients of their own, and a change of one in place would not reach the others' graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from spu.common import torch_private
from spu.common.torch_private import pytree
from spu.model.aliases import View, memory_of, share_memory, views_among
from spu.ops.cut import Cut, LeafCut, cut, cut_leaf

__all__ = ["Arrival", "Layout", "arrive", "check_known", "depart"]


@dataclass(frozen=True)
class _Kind:
    """Properties of a tensor that the receiver needs.

    Attributes:
        requires_grad: the tensor requires a gradient.
        leaf, leaf_view: it is a leaf that requires a gradient (a parameter), or a view of one: autograd forbids changes
            of these in place.
        tangled: name of another tensor with the same memory, where a change in place would be missed; empty: none.
    """

    requires_grad: bool
    leaf: bool = False
    leaf_view: bool = False
    tangled: str = ""


@dataclass(frozen=True)
class Layout:
    """How the output is put together: its leaves, with the places of tensors that cross, and views of those."""

    leaves: list[Any]
    spec: Any
    kinds: list[_Kind]

    @property
    def tensors_alone(self) -> bool:
        """Whether all leaves are tensors: two such layouts that are equal are the same JSON. (1 equals True.)"""
        return all(isinstance(leaf, _Index | View) for leaf in self.leaves)

    def plain(self) -> dict[str, Any]:
        """Return the layout as JSON, for another process.

        Raises:
            TypeError: a leaf that is no tensor, number or text, or a structure that torch's pytree cannot write down.
        """
        try:
            spec = pytree.treespec_dumps(self.spec)
        except (NotImplementedError, ValueError) as error:
            raise TypeError(f"a layer's output is a structure that cannot cross to another process: {error}") from error
        kinds = [asdict(kind) for kind in self.kinds]
        return {"leaves": [_plain(leaf) for leaf in self.leaves], "spec": spec, "kinds": kinds}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Layout:
        """Return the layout that :meth:`plain` has written down."""
        leaves = [_leaf(leaf) for leaf in plain["leaves"]]
        return Layout(leaves, pytree.treespec_loads(plain["spec"]), [_Kind(**kind) for kind in plain["kinds"]])


@dataclass(frozen=True)
class _Index:
    of: int


def _leaf(plain: Mapping[str, Any]) -> Any:
    if "of" in plain:
        return _Index(plain["of"])
    if "view" not in plain:
        return plain["value"]
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in plain["view"].items()}
    return View(**values)


def _plain(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, _Index):
        return {"of": leaf.of}
    if isinstance(leaf, View):
        return {"view": asdict(leaf)}
    if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise TypeError(
            f"a layer hands a {type(leaf).__name__} to the next stage, in another process: only tensors, numbers and "
            "texts cross, in tuples, lists and dicts"
        )
    return {"value": leaf}


@dataclass
class Arrival:
    """The output in the stage that receives it.

    Attributes:
        tree: the input of the next layer.
        ends: receives the gradient of each sent tensor; None for a tensor without one.
    """

    tree: Any
    ends: list[Cut | LeafCut | None]
    _watched: list[tuple[Tensor, int, str]]

    def check(self) -> None:
        """Check, after the stage's forward, that no shared memory was changed in place.

        Raises:
            RuntimeError: a tensor was changed in place whose memory another stage uses without seeing the change.
        """
        for tensor, version, other in self._watched:
            if torch_private.version(tensor) != version:
                raise RuntimeError(
                    f"a layer changes its input in place, whose memory {other} has too, in another stage: it would "
                    "not be changed there as in the plain model. Change a copy (x.clone()), or hand on a copy"
                )


_ONE = pytree.tree_structure(0)


def depart(
    tree: Any, stashed: Iterable[tuple[str, Tensor]], buffers: Callable[[], Iterable[Tensor]]
) -> tuple[Any, ...]:
    """Return the message of an output: its tensors, each memory once, and the layout.

    Args:
        tree: the output of the stage's last layer.
        stashed: (name, tensor) of tensors that skip to other stages.
        buffers: returns the tensors that the stage keeps for later microbatches.
    """
    others = list(stashed)
    if isinstance(tree, Tensor) and tree.requires_grad and not others:  # most of them are
        return [tree], Layout([_Index(0)], _ONE, [_kind(tree, "")])
    leaves, spec = pytree.tree_flatten(tree)
    views = views_among(leaves)
    places: dict[int, int] = {}
    tensors: list[Tensor] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and index not in views:
            places[index] = len(tensors)
            tensors.append(leaf)
    layout = [_placed(index, leaf, places, views) for index, leaf in enumerate(leaves)]
    kinds = [_kind(tensor, _tangled(tensor, tensors, others)) for tensor in tensors]
    for index, (tensor, kind) in enumerate(zip(tensors, kinds)):
        # A buffer as output: the next microbatch may change it before this one's value has been read.
        if not kind.requires_grad and memory_of(tensor) and any(share_memory(tensor, own) for own in buffers()):
            tensors[index] = tensor.clone()
            kinds[index] = replace(kind, tangled="a buffer")
    return tensors, Layout(layout, spec, kinds)


def _placed(index: int, leaf: Any, places: dict[int, int], views: dict[int, View]) -> Any:
    if index in views:
        return replace(views[index], of=places[views[index].of])
    return _Index(places[index]) if index in places else leaf


def _kind(tensor: Tensor, tangled: str) -> _Kind:
    if not tensor.requires_grad:
        return _Kind(False, tangled=tangled)
    base = torch_private.view_base(tensor)
    return _Kind(True, tensor.is_leaf, base is not None and base.is_leaf, tangled)


def _tangled(tensor: Tensor, tensors: list[Tensor], others: list[tuple[str, Tensor]]) -> str:
    for name, other in others:
        if share_memory(tensor, other):
            return name
    if any(other is not tensor and share_memory(tensor, other) for other in tensors):
        return "another output of the same layer"
    return ""


def arrive(message: Any, *, train: bool) -> Arrival:
    """Rebuild the output in the next stage; with ``train`` as the start of a graph of its own.

    Args:
        message: from `depart`, with its tensors on this device; or any structure of tensors.
        train: gradients will arrive at its ends.
    """
    if not (isinstance(message, tuple) and len(message) == 2 and isinstance(message[1], Layout)):
        leaves, spec = pytree.tree_flatten(message)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places = iter(range(len(tensors)))
        layout = [_Index(next(places)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        message = tensors, Layout(layout, spec, [_Kind(t.is_floating_point() or t.is_complex()) for t in tensors])
    tensors, how = message
    strides = {leaf.of: leaf for leaf in how.leaves if isinstance(leaf, View)}
    begun: list[Tensor] = []
    ends: list[Cut | LeafCut | None] = []
    for index, (tensor, kind) in enumerate(zip(tensors, how.kinds, strict=True)):
        if index in strides and tensor.stride() != strides[index].base_stride:  # a packed tensor arrives contiguous
            tensor = torch.empty_strided(
                tensor.shape, strides[index].base_stride, dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
        end: Cut | LeafCut | None = None
        if train and kind.requires_grad:
            tensor, end = cut_leaf(tensor, view=kind.leaf_view) if kind.leaf or kind.leaf_view else cut(tensor)
        begun.append(tensor)
        ends.append(end)
    leaves = [
        begun[leaf.of] if isinstance(leaf, _Index) else leaf.on(begun[leaf.of]) if isinstance(leaf, View) else leaf
        for leaf in how.leaves
    ]
    watched = [(t, torch_private.version(t), kind.tangled) for t, kind in zip(begun, how.kinds) if kind.tangled]
    return Arrival(pytree.tree_unflatten(leaves, how.spec), [*ends, None], watched)


# Tensors that pytree does not see


def check_known(tree: Any, what: str) -> None:
    """Check that pytree finds all tensors: others would cross without being cut or copied.

    Raises:
        TypeError: an object in the structure holds tensors; the message begins with ``what``.
    """
    for leaf in pytree.tree_leaves(tree):
        if not isinstance(leaf, Tensor) and _hides_tensors(leaf, set(), 4):
            raise TypeError(
                f"{what} a {type(leaf).__name__} with tensors: use tensors in tuples, lists, dicts or named tuples, or "
                "register the class with torch.utils._pytree"
            )


def _hides_tensors(value: Any, seen: set[int], depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if value is None or isinstance(value, (str, bytes, int, float, type)) or id(value) in seen or depth == 0:
        return False
    seen.add(id(value))
    return any(_hides_tensors(part, seen, depth - 1) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or ())
    yield from getattr(value, "__dict__", {}).values() if not isinstance(value, FunctionType) else ()
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if isinstance(name, str) and not name.startswith("__") and hasattr(value, name):
                yield getattr(value, name)
