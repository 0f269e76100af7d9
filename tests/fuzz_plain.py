"""The plain half of the fuzzer: a case, and the same training in plain PyTorch, microbatch after microbatch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_layers import LENGTH, as_plain
from fuzz_losses import LOSSES
from torch import Tensor, nn

import spu
from spu import LayerRandomness

__all__ = ["IN", "OPTIMIZERS", "VOCAB", "Case", "Plain", "batch"]

IN, VOCAB = 6, 7


@dataclass
class Case:
    """What a seed stands for; printed when it fails."""

    seed: int
    names: list[str]
    long: bool
    ids: bool
    tied: bool
    loss: str
    precision: str
    backend: str | None
    stages: int
    schedule: str
    microbatches: int
    accumulate: int
    rows: int
    recompute: list[int]
    cuts: list[int] | None
    optimizer: str
    clip: float | None
    transfer: str
    actions: list[str]
    streaming: dict[str, str] = field(default_factory=dict)  # settings; empty: the model is resident


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


# A large eps: the update is a smooth function of gradients, also of those that are rounding errors of zero.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (_sgd, _sgd),
    "adamw": (
        functools.partial(spu.optim.AdamW, lr=0.02, eps=0.1),
        functools.partial(torch.optim.AdamW, lr=0.02, eps=0.1),
    ),
}


class Plain:
    """The same training in plain PyTorch; with ``autocast`` in that dtype."""

    def __init__(self, case: Case, model: nn.Sequential, loss_fn: Any, autocast: torch.dtype | None = None) -> None:
        self.case, self.model, self.loss_fn, self.autocast = case, model, loss_fn, autocast
        self.loss = LOSSES[case.loss]
        self.parts = case.microbatches * case.accumulate
        as_plain(model)
        self.begin()

    def begin(self) -> None:
        """Of a new trainer."""
        self.optimizer = OPTIMIZERS[self.case.optimizer][1](self.parameters())
        self.passes = 0

    def parameters(self) -> list[nn.Parameter]:
        own = [*self.model.parameters(), *(self.loss_fn.parameters() if isinstance(self.loss_fn, nn.Module) else [])]
        return [p for p in own if p.requires_grad]

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss_fn is None:
            return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())
        return self.loss_fn(outputs.float(), targets)

    def run(self, x: Tensor, y: Tensor, *, train: bool) -> Tensor:
        """The batch's loss; with ``train`` its gradients are added up in the parameters."""
        shares = [self.loss.counts(part) for part in y.tensor_split(self.parts)]
        total = torch.stack(shares).sum()
        loss = torch.zeros((), dtype=torch.float64)
        batches = zip(x.tensor_split(self.parts), y.tensor_split(self.parts), shares)
        for index, (part_x, part_y, share) in enumerate(batches):
            hidden: Any = part_x.clone()
            with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                for name, layer in self.model.named_children():
                    with LayerRandomness(0, self.passes, index, name):
                        hidden = layer(hidden)
            if share > 0:
                value = self.value(hidden, part_y)
                value = value if self.loss.sums else value * (share / total).to(value.dtype)
                if train:
                    value.backward()
                loss += value.detach()
            elif train and hidden.requires_grad:  # in the whole batch these rows have a gradient of 0, not none
                hidden.flatten()[:0].sum().backward()
        if train:
            self.passes += 1
        return loss

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        with torch.no_grad():
            loss = self.run(x, y, train=False)
        for module, mode in modes:
            module.training = mode
        return loss

    def forget(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def update(self) -> None:
        if self.case.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.case.clip)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        new = [p for p in self.parameters() if id(p) not in known]
        if new:
            self.optimizer.add_param_group({"params": new})
        self.optimizer.step()
        self.forget()


def batch(case: Case, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed * 1000 + number)
    shape = (case.rows, LENGTH) if case.long else (case.rows,)
    x = torch.randint(VOCAB, shape, generator=generator) if case.ids else torch.randn(*shape, IN, generator=generator)
    loss = LOSSES[case.loss]
    return x, loss.targets(generator, shape if case.long and loss.long else (case.rows,))
