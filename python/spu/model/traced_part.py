"""A layer of a traced model: some nodes of its graph, run one after the other on the user's own modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from spu.common import torch_private
from spu.common.torch_private import pytree
from spu.model.spaces import dotted
from spu.model.tracing import Untraceable, atoms_of

__all__ = ["NORMS", "InputTree", "Part", "Watch"]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, torch_private.NormBase)


class InputTree:
    """How a model's inputs are arranged: where their tensors are, and what else is in them.

    Attributes:
        tensors: how many there are.
    """

    def __init__(self, inputs: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(inputs)
        self._others = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        self.tensors = self._others.count(None)

    def tree(self, tensors: Sequence[Any]) -> Any:
        """Return inputs that are arranged so, with ``tensors`` (or what stands for them)."""
        rest = iter(tensors)
        leaves = [next(rest) if other is None else other[0] for other in self._others]
        return pytree.tree_unflatten(leaves, self._spec)

    def tensors_of(self, inputs: Any) -> list[Any]:
        """Return the tensors of inputs.

        Raises:
            ValueError: they are arranged otherwise.
        """
        leaves, spec = pytree.tree_flatten(inputs)
        others = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        if spec != self._spec or others != self._others:
            raise ValueError(
                "the inputs are arranged otherwise than in the batch that the trainer was prepared with, or hold other "
                "values beside tensors, and the model was traced with those: make a new trainer for such batches"
            )
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Watch:
    """Notices changes of the modules that were looked into: what their code read was recorded."""

    def __init__(self, opened: dict[str, nn.Module]) -> None:
        self._seen = [(name, module, atoms_of(module)) for name, module in opened.items()]

    def check(self) -> None:
        """Raise RuntimeError for an attribute that was changed."""
        for name, module, before in self._seen:
            now = atoms_of(module)
            if now != before:
                key = next(k for k in {**before, **now} if now.get(k, self) != before.get(k, self))
                raise RuntimeError(
                    f"{dotted(name, key)!r} was changed after this trainer prepared, which has recorded "
                    "the model's forward with the value of then: undo it, or save() the trainer, make a new one for "
                    "the model as it is now, prepare() and load()"
                )


class _Holder(torch_private.Moved):
    """Stands where a module was that is not called whole: it has the children and tensors of it that are used."""

    def __init__(self) -> None:
        super().__init__()
        self._owned = _Owned(self)

    def hold(self, owner: nn.Module, name: str, path: str) -> None:
        """Use a parameter or buffer of the module that this stands for; ``path``: its name in the model.

        Raises:
            Untraceable: it would not stay the same tensor in both.
        """
        if name in torch_private.parameters_of(owner):
            if isinstance(owner, NORMS):
                raise Untraceable(f"its forward uses {path!r} of a normalisation without calling it")
            self.register_parameter(name, torch_private.parameters_of(owner)[name])
            return
        buffer = torch_private.buffers_of(owner)[name]
        if buffer is not None and buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise Untraceable(f"buffer {path!r} belongs to no module that is called whole, and is not in fp32")
        self.register_buffer(name, buffer, persistent=path in owner.state_dict(prefix=path[: -len(name)]))
        self._owned.add(owner, name, path)

    def moved(self) -> None:
        """Give the user's modules the buffers that it has now."""
        self._owned.moved(self)

    def check(self) -> None:
        """Raise RuntimeError for a buffer that was replaced in the user's module."""
        self._owned.check()


class _Owned:
    """Buffers that a holder shares with the user's modules; no copy of the holder has a part in it."""

    def __init__(self, holder: nn.Module) -> None:
        self._holder = id(holder)
        self._rows: list[tuple[nn.Module, str, str]] = []
        self._seen: dict[str, torch.Tensor | None] = {}

    @property
    def paths(self) -> list[str]:
        return list(self._seen)

    def add(self, owner: nn.Module, name: str, path: str) -> None:
        self._rows.append((owner, name, path))
        self._seen[path] = torch_private.buffers_of(owner)[name]

    def moved(self, holder: nn.Module) -> None:
        if id(holder) == self._holder:
            for owner, name, path in self._rows:
                self._seen[path] = torch_private.buffers_of(holder)[name]
                torch_private.buffers_of(owner)[name] = self._seen[path]

    def check(self) -> None:
        for owner, name, path in self._rows:
            if torch_private.buffers_of(owner).get(name) is not self._seen[path]:
                raise RuntimeError(
                    f"buffer {path!r} was replaced after this trainer prepared: copy the values into the one of then "
                    "(buffer.copy_(...)), or save() the trainer, make a new one for the model, prepare() and load()"
                )


class Part(nn.Module):
    """Computes some nodes of a traced graph.

    Args:
        model: the user's, child ``model`` of the graph's root.
        alive: the nodes whose values it is given, as a tuple.
        own: the nodes that it computes, in order.
        wanted: nodes (nested, with constants) whose values it returns.
        tree: of the first part, which is given the model's inputs: how these are arranged.
        outputs: of the last part, which returns the model's outputs: how these are arranged.
        watch: of the first part that is checked at every call.

    Attributes:
        why_so_few: of the first part: why there are not more parts, if something could not be looked into.
    """

    why_so_few: str = ""

    def __init__(
        self,
        model: nn.Module,
        alive: list[fx.Node],
        own: list[fx.Node],
        wanted: Any,
        tree: InputTree | None,
        outputs: Any,
        watch: Watch,
    ) -> None:
        super().__init__()
        self.model = _Holder()
        self._alive, self._own, self._wanted = alive, own, wanted
        self._tree, self._outputs, self._watch = tree, outputs, watch
        used = {node for step in own for node in step.all_input_nodes} | set(_nodes(wanted))
        called = {str(node.target).partition(".")[2] for node in own if node.op == "call_module"}
        for path in sorted(called, key=lambda path: path.count(".")):
            self._place(model, path)
        for path in sorted(str(node.target).partition(".")[2] for node in used if node.op == "get_attr"):
            self._hold(model, path)
        self._dies = _last_uses(own, set(_nodes(wanted)))

    @property
    def _holders(self) -> list[_Holder]:
        return [module for module in self.model.modules() if isinstance(module, _Holder)]

    def parameter_names(self) -> dict[str, str]:
        """Return local names of parameters and buffers with their names in the user's model."""
        named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {name: name.removeprefix("model.") for name, _ in named}

    def _place(self, model: nn.Module, path: str) -> None:
        """Put a module of the user's where it is in the model."""
        above, _, name = path.rpartition(".")
        holder = self._holder(above)
        if isinstance(holder, _Holder) and name not in torch_private.children_of(holder):
            holder.add_module(name, model.get_submodule(path))

    def _hold(self, model: nn.Module, path: str) -> None:
        above, _, name = path.rpartition(".")
        holder = self._holder(above)
        if isinstance(holder, _Holder):
            holder.hold(model.get_submodule(above), name, path)

    def take_rest(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Hold parameters and buffers that no part uses: they belong to the model's state."""
        for path in paths:
            above, _, _ = path.rpartition(".")
            owner = model.get_submodule(above)
            if above and not any(True for _ in owner.children()):
                self._place(model, above)
            self._hold(model, path)

    @property
    def buffers_held(self) -> list[str]:
        """Names of the buffers that it uses and no module that is called whole has."""
        return [path for holder in self._holders for path in holder._owned.paths]

    def _holder(self, path: str) -> nn.Module:
        """Return what stands at a place in the model: the user's own module, or a holder, which is made if needed."""
        module: nn.Module = self.model
        for name in filter(None, path.split(".")):
            child = torch_private.children_of(module).get(name)
            if child is None:
                assert isinstance(module, _Holder)
                child = _Holder()
                module.add_module(name, child)
            module = child
        return module

    def forward(self, given: Any) -> Any:
        """Return the values needed after this layer, or the model's outputs; ``given``: those alive before it."""
        result = self._computed(given, len(self._own), self._wanted)
        return result if self._outputs is None else pytree.tree_unflatten(list(result), self._outputs)

    @property
    def head(self) -> nn.Module | None:
        """The module that is called last, with one value, if what it returns is all that the model returns."""
        last = self._own[-1] if self._own else None
        if last is None or last.op != "call_module" or self._outputs is None or not self._outputs.is_leaf():
            return None
        alone = list(self._wanted) == [last] and len(last.args) == 1 and not last.kwargs
        return self.get_submodule(str(last.target)) if alone else None

    def until_head(self, given: Any) -> Any:
        """Return what :attr:`head` is called with; ``given``: as :meth:`forward` takes it."""
        return self._computed(given, len(self._own) - 1, self._own[-1].args[0])

    def _computed(self, given: Any, count: int, wanted: Any) -> Any:
        """Run the first ``count`` nodes and return the values of those that are wanted."""
        if self._tree is not None:
            self._watch.check()
            given = (self._tree.tensors_of(given),)
        for holder in self._holders:
            holder.check()
        values: dict[fx.Node, Any] = dict(zip(self._alive, given, strict=True))
        del given

        def value(node: fx.Node) -> Any:
            if node.op == "get_attr":
                return self._at(str(node.target))
            return values[node]

        for node, dead in zip(self._own[:count], self._dies):
            args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
            if node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                target: Any = self.get_submodule(str(node.target)) if node.op == "call_module" else node.target
                values[node] = target(*args, **kwargs)
            del args, kwargs
            for each in dead:
                values.pop(each, None)
        return map_arg(wanted, value)

    def _at(self, path: str) -> Any:
        above, _, name = path.rpartition(".")
        return getattr(self.get_submodule(above), name)


def _nodes(tree: Any) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    map_arg(tree, lambda node: found.setdefault(node))
    return list(found)


def _last_uses(own: list[fx.Node], kept: set[fx.Node]) -> list[list[fx.Node]]:
    """Return for each node the values that nothing needs after it, itself where nothing does."""
    seen: set[fx.Node] = set(kept)
    dies: list[list[fx.Node]] = []
    for node in reversed(own):
        dead = [other for other in dict.fromkeys([node, *node.all_input_nodes]) if other not in seen]
        seen.update(dead)
        dies.append(dead)
    return dies[::-1]
