"""Which parameters a stage's graph ends in: only its own have the hooks, the gradient buffer and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.model.layers import Layer

__all__ = ["check_leaves", "loss_part", "move_loss"]


def loss_part(loss_fn: Any, layers: Iterable[Layer]) -> Layer | None:
    """A loss that is a module, or a method or partial of one, as something that the last stage trains.

    Returns:
        None without parameters to train, and for a loss that holds the model itself.

    Raises:
        ValueError: it holds the model's layers and parameters of its own as well.
    """
    found = _modules_of(loss_fn)
    holder = found[0] if len(found) == 1 else nn.ModuleList(found)
    if not any(p.requires_grad for p in holder.parameters()):
        return None
    modules = [m for layer in layers for m in layer.module.modules()]
    within = {id(m) for m in modules if torch_private.parameters_of(m) or torch_private.buffers_of(m)}
    if any(id(m) in within for m in holder.modules()):
        known = {id(p) for m in modules for p in torch_private.parameters_of(m).values()}
        own = [name for name, p in holder.named_parameters() if id(p) not in known and p.requires_grad]
        if own:
            raise ValueError(
                f"loss_fn holds layers of the model, and {own[0]!r}, which is none of theirs and would not be trained: "
                "give loss_fn its own parameters only (a single parameter of the model may be among them)"
            )
        return None
    return Layer("loss_fn", holder)


def move_loss(loss_fn: Any, device: torch.device) -> None:
    """Parameters and buffers of a loss to where it is computed."""
    for module in _modules_of(loss_fn):
        module.to(device)


def _modules_of(loss_fn: Any) -> list[nn.Module]:
    if isinstance(loss_fn, nn.Module):
        return [loss_fn]
    if isinstance(loss_fn, partial):
        inner = _modules_of(loss_fn.func)
        given = [v for v in (*loss_fn.args, *loss_fn.keywords.values()) if isinstance(v, nn.Module)]
        return list({id(m): m for m in [*inner, *given]}.values())
    owner = getattr(loss_fn, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def check_leaves(
    roots: Iterable[Any], own: Iterable[nn.Parameter], elsewhere: Mapping[int, str], *, foreign: bool, stage: int
) -> None:
    """Whether a stage's backward ends where its gradients are looked after.

    Args:
        roots: tensors that the backward starts from.
        own: the stage's parameters.
        elsewhere: id -> name of the other stages' parameters.
        foreign: parameters that the trainer does not know are fine.

    Raises:
        RuntimeError: it ends in a parameter of another stage, or in a foreign one.
    """
    known = {id(parameter) for parameter in own}
    for leaf in _leaves(roots):
        if id(leaf) in known:
            continue
        if id(leaf) in elsewhere:
            raise RuntimeError(
                f"parameter {elsewhere[id(leaf)]!r} of another stage is used in stage {stage} by code that does not "
                "hold it: both stages would add to its gradient at the same time. Make it a parameter of the module "
                "that uses it too (self.weight = other.weight), a loss_fn an nn.Module that does so"
            )
        if not foreign and isinstance(leaf, nn.Parameter):
            raise RuntimeError(
                f"stage {stage} uses a parameter of shape {tuple(leaf.shape)} that is in no layer: it would not be "
                "updated, and its gradient would stay multiplied by the loss scale. Make it a parameter of the module "
                "that uses it, a loss_fn an nn.Module that holds it; the trainer then trains it"
            )


def _leaves(roots: Iterable[Any]) -> list[torch.Tensor]:
    stack = [root.grad_fn for root in roots if isinstance(root, torch.Tensor) and root.grad_fn is not None]
    seen, leaves = set(stack), []
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves
