"""The result of a step as the user reads it, and the results of its microbatches joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spu.common.torch_private import pytree
from spu.devices.clock import Elapsed
from spu.engine.microbatch import join_rows

__all__ = ["StepResult", "join_outputs", "sum_losses"]


@dataclass(frozen=True)
class StepResult:
    """The result of one step. Values stay on their device; reading an attribute waits for it."""

    loss_tensor: torch.Tensor
    grad_norm_tensor: torch.Tensor
    loss_scale_tensor: torch.Tensor
    found_inf_tensor: torch.Tensor
    targets: int | torch.Tensor
    elapsed: Elapsed
    peak_bytes: dict[str, int]

    @property
    def loss(self) -> float:
        """The batch's loss, unscaled: the mean over what it counts, or the sum for one that adds up."""
        return self.loss_tensor.item()

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the true gradients, before clipping; not finite for a skipped step."""
        return self.grad_norm_tensor.item()

    @property
    def loss_scale(self) -> float:
        """The scale that this step's loss was multiplied by."""
        return self.loss_scale_tensor.item()

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite, so that nothing was updated."""
        return bool(self.found_inf_tensor.item())

    @property
    def seconds(self) -> float:
        """The whole step's time: on cards from the end of what they did before until they have done it."""
        return self.elapsed.seconds

    @property
    def tokens_per_s(self) -> float:
        """Counted targets a second, the whole step included."""
        return float(self.targets) / self.seconds


def sum_losses(losses: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the batch's loss: its microbatches' shares, added in microbatch order."""
    first, *others = sorted(losses)
    total = losses[first] + 0.0  # on its own device: a zero made on the host would have to be copied there
    for index in others:
        total = total + losses[index]
    return total


def join_outputs(outputs: list[Any]) -> Any:
    """Join the microbatches' outputs along dimension 0; list outputs without a batch dimension."""
    columns = [pytree.tree_flatten(output) for output in outputs]
    spec = columns[0][1]
    leaves = [list(column) for column in zip(*(leaves for leaves, _ in columns))]
    joined = [join_rows(*c) if isinstance(c[0], torch.Tensor) and c[0].dim() else c for c in leaves]
    return pytree.tree_unflatten(joined, spec)
