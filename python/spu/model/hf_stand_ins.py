"""What stands for the children of a base model in its shell (``hf_context.py``): recorders and stand-ins."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from spu.common import torch_private

__all__ = [
    "LayerCall",
    "Recorder",
    "Stand",
    "StandCall",
    "copy_without_children",
    "hidden_of",
    "plain_attributes",
    "unwrapped",
]

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class Recorder(nn.Module):
    """Replaces a decoder layer: returns its input and records its arguments.

    It has the layer's plain attributes, such as its attention type.

    Args:
        layer: which it replaces.
        index: its place among the layers.
        returns: how many values the layer returns, the hidden state first; 0: the hidden state itself.
        log: gets the index when it is called.
    """

    def __init__(self, layer: nn.Module, index: int, returns: int, log: list[Any]) -> None:
        super().__init__()
        vars(self).update(plain_attributes(layer))
        self._index, self._returns, self._log = index, returns, log
        self._calls: list[tuple[torch.Tensor, LayerCall]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._log.append(self._index)
        hidden, rest, named = hidden_of(args, kwargs)
        self._calls.append((hidden, (rest, named)))
        return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

    def take(self) -> tuple[torch.Tensor, LayerCall]:
        """Return the one call since the last `take`: (hidden state, (args, kwargs))."""
        calls = self._calls
        self.forget()
        if len(calls) != 1:
            raise ValueError(
                f"the base model calls decoder layer {self._index} {len(calls)} times in one forward: not supported"
            )
        return calls[0]

    def forget(self) -> None:
        """Drop what was recorded."""
        self._calls = []


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return what a layer is called with as (hidden state, other positional arguments, other keywords)."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


class Stand(nn.Module):
    """Replaces a child of the base model that has weights, or neither weights nor tables: keeps shapes, has no values.

    What embeds gives zeros, what projects too; a norm or a dropout gives its input back. So the arguments that layers
    get can be computed without the weights, as far as they do not depend on them.

    Args:
        name: of the child.
        module: the child.
        log: gets a `StandCall` for each call.
    """

    def __init__(self, name: str, module: nn.Module, log: list[Any]) -> None:
        super().__init__()
        self.name, self._log = name, log
        module = unwrapped(module)
        self.embeds = isinstance(module, nn.Embedding)
        self._width: int | None = None  # of what it returns; None: that of what it gets
        if isinstance(module, nn.Embedding):
            self._width = module.embedding_dim
        elif any(parameter.dim() > 1 for parameter in module.parameters()):
            self._width = getattr(module, "out_features", getattr(module, "nf", None))  # nn.Linear, Conv1D
            if self._width is None:
                raise ValueError(
                    f"{name} ({type(module).__name__}) beside the layers is no embedding, norm or projection"
                )
        self.dtype = torch.float32  # of the hidden states

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        returned = given
        if self._width is not None:
            shape = given.shape if self.embeds else given.shape[:-1]
            returned = torch.zeros((), dtype=self.dtype, device=given.device).expand(*shape, self._width)
        self._log.append(StandCall(self.name, self.embeds, (args, kwargs), given, returned))
        return returned


class StandCall(NamedTuple):
    """A call of a stand-in.

    Attributes:
        name: of the child that it replaces.
        embeds: the child is an embedding.
        call: (args, kwargs).
        given, returned: its first tensor, and its result.
    """

    name: str
    embeds: bool
    call: LayerCall
    given: torch.Tensor
    returned: torch.Tensor


def unwrapped(module: Any) -> Any:
    """Return the module that adapters wrap."""
    while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
        module = inner
    return module


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's numbers, texts and flags, which the forward of the model around it may read."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and isinstance(value, str | int | float | bool | type(None))
    }


def copy_without_children(module: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` with new tables of children, parameters and buffers, and no child."""
    clone = copy.copy(module)
    buffers = {k: b if b is None else b.detach().clone() for k, b in torch_private.buffers_of(module).items()}
    torch_private.set_tables(clone, dict(torch_private.parameters_of(module)), buffers, {})
    return clone
