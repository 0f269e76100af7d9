"""What a stage stashes for later stages and pops from earlier ones, in one microbatch."""

from __future__ import annotations

import torch
from torch import Tensor

from spu.engine.channel import Exchange
from spu.ops.cut import Cut, cut

__all__ = ["StageSkips", "check_all_popped"]


class StageSkips:
    """The carrier of one stage's forward of one microbatch, and the way of the gradients in its backward.

    A message is always there when it is asked for: a stage sends what it stashed before its output, and the gradients
    of what it popped before those of its input.

    Args:
        exchange: the mailboxes of this run.
        microbatch: which one.
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
        self._taken: dict[str, Cut] = {}

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
        tensor: Tensor = self._exchange.take(key).to(self._device)
        if self._train and (tensor.is_floating_point() or tensor.is_complex()):
            tensor, self._taken[name] = cut(tensor)
        return tensor

    def send(self) -> None:
        """After the forward: what was stashed and not popped here goes on its way."""
        for name, tensor in self._here.items():
            self._exchange.put(("skip", name, self._microbatch), tensor.detach())
        if self._train:
            self._sent = self._here
        self._here = {}

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Before the backward: what was sent, with its gradient, where there is one."""
        pairs = []
        for name, tensor in self._sent.items():
            key = ("skip gradient", name, self._microbatch)
            gradient = self._exchange.take(key) if self._exchange.has(key) else None
            if gradient is not None and tensor.requires_grad:
                pairs.append((tensor, gradient.to(tensor.device)))
        return pairs

    def send_gradients(self) -> None:
        """After the backward: the gradients of what was popped go back."""
        for name, end in self._taken.items():
            self._exchange.put(("skip gradient", name, self._microbatch), end.gradient)


def check_all_popped(exchange: Exchange) -> None:
    """At the end of a run. Raises ValueError for what was stashed and never popped."""
    for kind, name, _ in exchange.untaken():
        if kind == "skip":
            raise ValueError(f"{name!r} was stashed, but no later layer has popped it: pop it, or do not stash it")
