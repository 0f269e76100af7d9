"""The tensors that a stage stashes for later stages and pops from earlier ones, in one microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spu.common import torch_private
from spu.engine.channel import Exchange
from spu.engine.microbatch import move
from spu.model.aliases import share_memory
from spu.ops.cut import Cut, LeafCut, cut, cut_leaf

__all__ = ["StageSkips", "check_all_popped"]


class StageSkips:
    """The carrier of one stage's forward of one microbatch, which also returns the gradients in its backward.

    No message is waited for: a stage sends its stashed tensors before its output, and the gradients of popped tensors
    before those of its input.

    Args:
        exchange: the mailboxes of this run.
        microbatch: its number.
        device: the stage's.
        train: gradients will come back.
    """

    def __init__(self, exchange: Exchange, microbatch: int, device: torch.device, *, train: bool) -> None:
        self._exchange = exchange
        self._microbatch = microbatch
        self._device = device
        self._train = train
        self._here: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}
        self._taken: dict[str, Cut | LeafCut] = {}
        self._watched: list[tuple[str, Tensor, int]] = []
        self.arrived: list[Any] = []  # the leaves of the stage's input

    def stash(self, name: str, tensor: Tensor) -> None:
        if name in self._here or self._exchange.has(("skip", name, self._microbatch)):
            raise ValueError(f"{name!r} is stashed already and has not been popped; stash it under another name")
        self._here[name] = tensor

    def pop(self, name: str) -> Tensor:
        if name in self._here:
            return self._here.pop(name)
        key = ("skip", name, self._microbatch)
        if not self._exchange.has(key):
            raise ValueError(f"no layer before this one has stashed {name!r}, or it was popped already")
        sent: _Skip = self._exchange.take(key)
        if torch_private.version(sent.tensor) != sent.version:
            raise RuntimeError(_changed(name))
        tensor = move(sent.tensor, self._device)
        if self._train and sent.requires_grad:
            tensor, self._taken[name] = cut_leaf(tensor, view=not sent.leaf) if sent.fixed else cut(tensor)
        if any(share_memory(tensor, leaf) for leaf in self.arrived if isinstance(leaf, Tensor)):
            self._watched.append((name, tensor, torch_private.version(tensor)))
        return tensor

    def outgoing(self) -> list[tuple[str, Tensor]]:
        """Return the stashed tensors that go to other stages, each with words for messages."""
        return [(f"{name!r}, which was stashed,", tensor) for name, tensor in self._here.items()]

    def check(self) -> None:
        """Check, after the forward, the memory that popped tensors share with the stage's input.

        Raises:
            RuntimeError: a popped tensor was changed in place through the stage's input.
        """
        for name, tensor, version in self._watched:
            if torch_private.version(tensor) != version:
                raise RuntimeError(_changed(name))

    def send(self) -> None:
        """Send, after the forward, the tensors that were stashed and not popped here."""
        for name, tensor in self._here.items():
            base = torch_private.view_base(tensor)
            fixed = tensor.requires_grad and (tensor if base is None else base).is_leaf
            cut_off = tensor.detach()
            skip = _Skip(cut_off, torch_private.version(cut_off), tensor.requires_grad, tensor.is_leaf, fixed)
            self._exchange.put(("skip", name, self._microbatch), skip)
        if self._train:
            self._sent = self._here
        self._here = {}

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return, before the backward, the sent tensors that have a gradient, each with its gradient."""
        pairs = []
        for name, tensor in self._sent.items():
            key = ("skip gradient", name, self._microbatch)
            gradient = self._exchange.take(key) if self._exchange.has(key) else None
            if gradient is not None and tensor.requires_grad:
                pairs.append((tensor, move(gradient, tensor.device)))
        return pairs

    def ends(self) -> list[Cut | LeafCut]:
        """Return where the gradients of popped tensors arrive."""
        return list(self._taken.values())

    def send_gradients(self) -> None:
        """Send back, after the backward, the gradients of popped tensors."""
        for name, end in self._taken.items():
            self._exchange.put(("skip gradient", name, self._microbatch), end.gradient)


@dataclass(frozen=True)
class _Skip:
    """A stashed tensor on its way.

    Attributes:
        tensor: its values, detached.
        version: their version counter when they were sent.
        requires_grad, leaf: of the stashed tensor.
        fixed: it is a leaf that requires a gradient, or a view of one: autograd forbids changes in place.
    """

    tensor: Tensor
    version: int
    requires_grad: bool
    leaf: bool
    fixed: bool


def _changed(name: str) -> str:
    return (
        f"{name!r} was changed in place after it was stashed, in another stage, by way of a tensor with the same "
        "memory: stash a copy (x.clone()), or do not change that tensor in place"
    )


def check_all_popped(exchange: Exchange) -> None:
    """Raise ValueError, at the end of a run, for a tensor that was stashed and never popped."""
    for kind, name, _ in exchange.untaken():
        if kind == "skip":
            raise ValueError(f"{name!r} was stashed, but no later layer has popped it: pop it, or do not stash it")
