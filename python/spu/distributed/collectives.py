"""Sums of a few values over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["added", "gathered", "summed"]


def summed(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum over a group's processes, in the order of ranks: the same bits in each.

    Every process gets all values: an all-reduce of gloo passes them round twice, and takes two to five times as long
    where a process waits for another (figures in docs/performance.md).

    Args:
        values: few, of one shape and dtype in all processes, where the group's transport reads them.
        group: None: all processes.
    """
    return added(gathered(values, group))


def added(everyones: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of what every process had, in order."""
    total = everyones[0]
    for each in everyones[1:]:
        total = total + each
    return total


def gathered(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """Return the values of each of a group's processes, by rank; arguments as for :func:`summed`."""
    everyones = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, values, group=group)
    return everyones
