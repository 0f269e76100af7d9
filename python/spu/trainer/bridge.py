"""Gradients across a ``detach`` between hand-run stages.

The loop ::

    for module in trainer.modules():
        x = x.detach().requires_grad_(True).to(module.device)
        x = module(x)
    loss_fn(x).backward()

cuts the graph at every stage in plain PyTorch: only the last one gets gradients. The modules that the trainer yields
recognise their input as an earlier module's output, because the detached tensor still shares its storage, and hang a
hook on it that continues the backward into the graph that made it.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.torch_private import pytree
from spu.ops.sink import current_scope, open_scope
from spu.skips import carried_by

__all__ = ["Bridge", "StageModule"]

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_MAX_PENDING = 256  # outputs that no later stage has taken yet


def _key(tensor: torch.Tensor) -> _Key:
    return (
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


class _Passage:
    """The state of a crossing. The output's hook refers to this only: a cycle would keep the output for ever."""

    def __init__(self) -> None:
        self.running = False
        self.done = False

    def check_source(self, gradient: torch.Tensor) -> None:
        if self.done and not self.running:
            raise RuntimeError(
                "this output's gradient was already carried into its stage by the bridge of trainer.modules(), at "
                "loss.backward(); continuing it by hand would count it twice: remove the manual "
                "output.backward(next_input.grad)"
            )


class _Crossing:
    """One output that a later stage consumes after a detach."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output
        self.passage = _Passage()
        output.register_hook(self.passage.check_source)

    def attach(self, leaf: torch.Tensor) -> None:
        leaf.register_hook(self.carry)

    def carry(self, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        # A nested backward is a graph task of its own: it needs the loss scale's scope too.
        scope = current_scope()
        gradient = gradient.to(self.output.device, self.output.dtype)
        self.passage.running = True
        try:
            with torch.enable_grad():  # hooks run without
                output = open_scope(self.output, scope) if scope is not None else self.output
            output.backward(gradient)
        finally:
            self.passage.running = False
            self.passage.done = True


class _HandCarrier:
    """The tensors that hand-run parts stash for later ones, with their graph: an error if the loop detaches."""

    def __init__(self) -> None:
        self.stage = 0
        self.cut_before = 0  # the last part whose input was detached
        self._tensors: dict[str, tuple[int, torch.Tensor]] = {}

    def stash(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = (self.stage, tensor)

    def pop(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ValueError(f"no part before this one has stashed {name!r}, or it was popped already")
        stage, tensor = self._tensors.pop(name)
        if tensor.requires_grad and stage < self.cut_before <= self.stage:
            raise ValueError(
                f"{name!r} was stashed in part {stage} and popped in part {self.stage}, but the loop detaches between "
                f"them: its gradient would go through part {stage} a second time. Hand it on as an output, or do "
                "not detach"
            )
        return tensor


class Bridge:
    """Matches the inputs of stages with the outputs of the stages before them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[_Key, torch.Tensor] = {}
        self.carrier = _HandCarrier()

    def produced(self, outputs: Any) -> None:
        """Remember a stage's outputs until the next stage takes them."""
        with self._lock:
            for key in [key for key, output in self._pending.items() if not torch_private.has_alias(output)]:
                del self._pending[key]
            for output in pytree.tree_leaves(outputs):
                if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                    self._pending[_key(output)] = output
            while len(self._pending) > _MAX_PENDING:
                del self._pending[next(iter(self._pending))]

    def consumed(self, inputs: Any, stage: int) -> None:
        """Connect a stage's inputs, if they were detached from an output of an earlier stage."""
        for tensor in pytree.tree_leaves(inputs):
            if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
                continue
            with self._lock:
                leaf = self._source_leaf(tensor)
                if leaf is None:
                    continue
                output = self._pending.pop(_key(leaf), None)
                waiting = any(out.shape == leaf.shape for out in self._pending.values())
            if output is not None and output is not leaf:
                _Crossing(output).attach(leaf)
                self.carrier.cut_before = stage
            elif waiting:
                warnings.warn(
                    f"the input of part {stage} requires a gradient but shares no storage with an output of an "
                    "earlier part, so that part gets no gradient; detach with "
                    "`out.detach().requires_grad_(True).to(module.device)`, without a clone before requires_grad_",
                    stacklevel=4,
                )

    def _source_leaf(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the leaf from which one-input operations (``.to``, ``.contiguous``) made a tensor.

        None if there is none, or if the chain meets a pending output: then nothing was detached, and autograd carries
        the gradient by itself.
        """
        if tensor.is_leaf:
            return tensor
        made = {output.grad_fn: key for key, output in self._pending.items()}
        node = tensor.grad_fn
        for _ in range(8):
            if node in made:
                del self._pending[made[node]]
                return None
            if node is None or hasattr(node, "variable"):
                return getattr(node, "variable", None)
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            if len(parents) != 1:
                return None
            node = parents[0]
        return None


class StageModule(nn.Module):
    """One part of the model on its device, callable by hand, bridged to its neighbours.

    Attributes:
        device: the ``torch.device`` to move inputs to.
        part: the wrapped module.
    """

    def __init__(self, part: nn.Module, index: int, device: torch.device, bridge: Bridge) -> None:
        super().__init__()
        self.part = part
        self.index = index
        self.device = device
        self._bridge = bridge

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        carrier = self._bridge.carrier
        if self.index == 0:
            carrier.stage = carrier.cut_before = 0
        elif torch.is_grad_enabled():
            self._bridge.consumed((args, kwargs), self.index)
        carrier.stage = self.index
        with carried_by(carrier):
            output = self.part(*args, **kwargs)
        if torch.is_grad_enabled():
            self._bridge.produced(output)
        return output

    def extra_repr(self) -> str:
        return f"index={self.index}, device={self.device}"
