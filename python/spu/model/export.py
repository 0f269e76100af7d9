"""A traced graph cut into consecutive layers, each a module of its own."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["cut_graph"]


def cut_graph(traced: Any) -> list[tuple[str, nn.Module]]:
    """A graph module as layers: one for each run of nodes that come from the same child of the model.

    Args:
        traced: a `torch.fx.GraphModule` whose nodes say where they come from (``nn_module_stack``).

    Returns:
        (name of the child, layer) pairs. Every layer takes the tuple of values that are alive before it (the first one
        the graph's inputs) and returns the tuple of those that are needed after it.
    """
    passive = ("placeholder", "output", "get_attr", "call_module")  # a module that is called checks the export's guards
    nodes = [node for node in traced.graph.nodes if node.op not in passive]
    output = next(node for node in traced.graph.nodes if node.op == "output")
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        name = _home(node)
        if not runs or (name and runs[-1][0] not in ("", name)):
            runs.append((name, []))
        elif name and not runs[-1][0]:
            runs[-1] = (name, runs[-1][1])
        runs[-1][1].append(node)
    alive = [node for node in traced.graph.nodes if node.op == "placeholder"]
    layers: list[tuple[str, nn.Module]] = []
    for k, (name, own) in enumerate(runs):
        later = {n for _, rest in runs[k + 1 :] for node in rest for n in node.all_input_nodes}
        later |= set(output.all_input_nodes)
        wanted = [node for node in [*alive, *own] if node in later]
        layers.append((name or f"part{k}", _layer(traced, alive, own, wanted)))
        alive = wanted
    return layers


def _home(node: fx.Node) -> str:
    """The child of the model, two levels deep at most in lists, that a node comes from; "" if it is the model's own."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    if not stack:
        return ""
    first = str(stack[0])
    deeper = next((str(path) for path in stack if str(path).startswith(f"{first}.")), None)
    if deeper is not None and deeper[len(first) + 1 :].split(".")[0].isdigit():
        return deeper
    return first


def _layer(traced: Any, alive: list[fx.Node], own: list[fx.Node], wanted: list[fx.Node]) -> nn.Module:
    """A module that computes ``wanted`` from the tuple ``alive``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = graph.placeholder("given")
    for index, node in enumerate(alive):
        copies[node] = graph.call_function(lambda values, at: values[at], (given, index))
    root = nn.Module()

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr", f"{node} is used before it is made"
            name = str(node.target).replace(".", "_")
            value = traced
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not hasattr(root, name):
                if isinstance(value, nn.Parameter):
                    root.register_parameter(name, value)
                else:
                    root.register_buffer(name, value)
            copies[node] = graph.get_attr(name)
        return copies[node]

    for node in own:
        copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copied(node) for node in wanted))
    graph.lint()
    return fx.GraphModule(root, graph)
