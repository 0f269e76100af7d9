"""Any module as layers: its forward is traced once, down to the modules in it that are called whole.

`torch.fx` records what a forward does *between* its modules; the modules themselves stay what they are, the user's
objects. So dropout, batch norm statistics, training and evaluation mode, hooks, fused ops and rows of any number need
no care here. (`torch.export` records operators instead: with the mode, the dtypes and most sizes of the example.)

Python code between the modules runs once, at tracing. A module in which that would not be exact is not looked into: it
is one layer. For the model itself there is no such way out, and it is refused. What was traced is held against the
model, on rows of the first batch, before it is trained.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from spu.common.dtypes import HALVES
from spu.common.errors import first_line
from spu.common.torch_private import pytree
from spu.model.traced_part import NORMS, InputTree, Part, Watch
from spu.model.tracing import Retry, Tracer, Untraceable
from spu.model.untouched import untouched
from spu.precision.dtypes import products_in

__all__ = ["traced_layers"]

_ELSE = "give the trainer its layers as a list, each an nn.Module that takes what the one before returns"


def traced_layers(model: nn.Module, inputs: Any) -> list[tuple[str, Part]]:
    """Cut a model into consecutive layers, which together compute what it does, bit for bit.

    A layer begins at each module with parameters that the forward calls; what follows it up to the next one (sums,
    activations, normalisations) is in it. Modules that are chains of modules are looked into; where that finds
    one layer alone, as in a wrapper around a small network, others too.

    Args:
        model: called as ``model(*inputs)`` for a tuple and ``model(**inputs)`` for a dict, where its forward has such
            parameters; otherwise as ``model(inputs)``.
        inputs: a batch.

    Raises:
        ValueError: the model cannot be cut so that it stays exact, or fails on this batch; says why.
    """
    whole: dict[str, str] = {}
    reason = ""
    for closed in (False, True):
        if closed:  # a last try: look into no module but the model
            whole |= {name: "" for name, _ in model.named_children()}
        try:
            layers = _cut(model, inputs, whole)
            _check_same(model, layers, inputs)
            if not closed and len(layers) == 1:
                layers = _cut_further(model, inputs, layers)
            inner = (f"module {name!r} is not looked into: {why}" for name, why in whole.items() if why)
            layers[0][1].why_so_few = reason or next(inner, "")
            return layers
        except Untraceable as error:
            reason = str(error)
    raise ValueError(f"{type(model).__name__} cannot be cut into layers: {reason}; {_ELSE}")


def _cut_further(model: nn.Module, inputs: Any, layers: list[tuple[str, Part]]) -> list[tuple[str, Part]]:
    """Return the layers found by looking into every module where that is exact, else those given."""
    try:
        more = _cut(model, inputs, {}, all_the_way=True)
        _check_same(model, more, inputs)
    except Untraceable:
        return layers
    return more


class _Call(nn.Module):
    """Calls the model with the tensors of a flat list, and returns its outputs as a flat list."""

    def __init__(self, model: nn.Module, tree: InputTree) -> None:
        super().__init__()
        self.model = model
        self._tree = tree
        self.outputs: Any = None  # how the outputs were arranged

    def forward(self, given: Any) -> list[Any]:
        """Return the leaves of the model's outputs; ``given``: the tensors of its inputs."""
        args, kwargs = arguments(self.model, self._tree.tree([given[i] for i in range(self._tree.tensors)]))
        leaves, self.outputs = pytree.tree_flatten(self.model(*args, **kwargs))
        return leaves


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments with which a model is called on a batch of inputs."""
    if type(inputs) is tuple and _binds(model, *inputs):
        return inputs, {}
    if type(inputs) is dict and all(isinstance(key, str) for key in inputs) and _binds(model, **inputs):
        return (), inputs
    return (inputs,), {}


def _binds(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def _cut(model: nn.Module, inputs: Any, whole: dict[str, str], *, all_the_way: bool = False) -> list[tuple[str, Part]]:
    tree = InputTree(inputs)
    graph, outputs, opened = _traced(model, tree, whole, training=True, all_the_way=all_the_way)
    other, other_outputs, _ = _traced(model, tree, whole, training=False, all_the_way=all_the_way)
    if _described(graph) != _described(other) or outputs != other_outputs:
        raise Untraceable(
            "its forward does something else in evaluation mode than in training (self.training): leave that to a "
            "module, as nn.Dropout for F.dropout"
        )
    watch = Watch(opened)
    groups = list(_groups(graph, model))
    end = next(node for node in graph.nodes if node.op == "output")
    alive = [node for node in graph.nodes if node.op == "placeholder"]
    layers: list[tuple[str, Part]] = []
    taken: set[str] = set()
    for k, (name, own) in enumerate(groups):
        used = {node for _, rest in groups[k + 1 :] for later in rest for node in later.all_input_nodes}
        used |= set(end.all_input_nodes)
        is_last = k == len(groups) - 1
        wanted = end.args[0] if is_last else tuple(node for node in [*alive, *own] if node in used)
        unique = next(n for n in (name, *(f"{name}#{i}" for i in range(2, len(groups) + 2))) if n not in taken)
        taken.add(unique)
        part = Part(model, alive, own, wanted, tree if k == 0 else None, outputs if is_last else None, watch)
        layers.append((unique, part))
        alive = list(wanted) if not is_last else []
    _complete(model, [part for _, part in layers])
    return layers


def _complete(model: nn.Module, parts: list[Part]) -> None:
    """Give the last part what none has of the model's state.

    Raises:
        Untraceable: several parts use a buffer, which one of them might change.
    """
    held = [path for part in parts for path in part.buffers_held]
    twice = next((path for path in held if held.count(path) > 1), None)
    if twice is not None:
        raise Untraceable(f"its forward uses buffer {twice!r} in several places: use it in one, or within a module")
    known = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    state = model.state_dict(keep_vars=True)
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    tensors += [(name, t) for name, t in model.named_buffers(remove_duplicate=False) if name in state]
    parts[-1].take_rest(model, [name for name, tensor in tensors if id(tensor) not in known])


def _traced(
    model: nn.Module, tree: InputTree, whole: dict[str, str], *, training: bool, all_the_way: bool
) -> tuple[fx.Graph, Any, dict[str, nn.Module]]:
    """Return the graph, the arrangement of its outputs, and the modules that were looked into, by name.

    ``whole`` is added to: names of modules that turned out not to be traceable inside, and why.
    """
    while True:
        call = _Call(model, tree)
        tracer = Tracer(whole, all_the_way)
        with untouched(model), tracer.unchanged(model):
            try:
                for module in model.modules():
                    module.training = training
                graph = tracer.trace(call)
            except Retry as retry:
                whole[retry.name] = _where(retry.__cause__, model) if isinstance(retry.__cause__, Exception) else ""
                continue
            except Untraceable:
                raise
            except Exception as error:
                raise Untraceable(_where(error, model)) from error
        if tracer.problem:
            raise Untraceable(tracer.problem)
        return graph, call.outputs, tracer.opened


def _where(error: Exception, model: nn.Module) -> str:
    """Return an error's first line, and the last line of a user's code that led to it."""
    text = first_line(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if not f.filename.startswith(__file__.rpartition("/")[0])]
    return f"{text} (line {frames[-1].lineno} of {frames[-1].filename}, in {frames[-1].name})" if frames else text


def _described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes]


def _groups(graph: fx.Graph, model: nn.Module) -> Iterator[tuple[str, list[fx.Node]]]:
    """Yield the nodes of each layer, with its name: that of its first module with parameters."""
    name, own, has_parameters = "", [], False  # type: str, list[fx.Node], bool
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.op == "call_module":
            path = str(node.target).partition(".")[2]
            module = model.get_submodule(path)
            begins = any(True for _ in module.parameters()) and not isinstance(module, NORMS)
            if begins and has_parameters:
                yield name, own
                name, own, has_parameters = "", [], False
            if begins and not has_parameters:
                name, has_parameters = path, True
        own.append(node)
    yield name or "model", own


def _check_same(model: nn.Module, layers: list[tuple[str, Part]], inputs: Any) -> None:
    """Run model and layers on at most two rows, in evaluation mode.

    Raises:
        ValueError: the model fails.
        Untraceable: they do not compute the same bits.
    """
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    def few(leaf: torch.Tensor) -> torch.Tensor:
        return (leaf[:2] if leaf.dim() else leaf).detach().clone().to(place)

    def plain(x: Any) -> Any:
        args, kwargs = arguments(model, x)
        return model(*args, **kwargs)

    def chain(x: Any) -> Any:
        for _, layer in layers:
            x = layer(x)
        return x

    def run(function: Callable[[Any], Any]) -> Any:
        with untouched(model, values=True), torch.no_grad(), _products(model):
            for module in model.modules():
                module.training = False
            return function(pytree.tree_map_only(torch.Tensor, few, inputs))

    try:
        expected, spec = pytree.tree_flatten(run(plain))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} fails on the first batch: {_where(error, model)}") from error
    try:
        found, own_spec = pytree.tree_flatten(run(chain))
    except Exception as error:
        raise Untraceable(f"its traced forward fails on the first batch: {_where(error, model)}") from error
    if spec != own_spec or not all(map(_equal, expected, found)):
        raise Untraceable(
            "what was traced computes something else: its forward decides by what a trace does not see (a tensor's "
            "type, a global)"
        )


def _products(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let a model with 16-bit parameters, as another trainer left it, take inputs of any dtype, as in training."""
    half = next((tensor for tensor in model.parameters() if tensor.dtype in HALVES), None)
    return contextlib.nullcontext() if half is None else products_in(half.dtype, True, half)


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
