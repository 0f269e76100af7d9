"""A sum of a few values: in the order of ranks, the same in each, of what is not finite too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import in_ranks

from spu.distributed.collectives import summed


def add() -> tuple[list[float], list[float], float, int]:
    rank = dist.get_rank()
    values = torch.tensor([(1e16, 1.0, -1e16)[rank], torch.inf if rank == 1 else 2.0], dtype=torch.float64)
    kept = values.clone()
    total = summed(values)
    assert torch.equal(values, kept)
    nan = summed(torch.tensor([torch.nan if rank == 0 else 0.0, float(rank)]))
    assert nan[0].isnan()
    alone = summed(torch.tensor(float(rank)), dist.new_subgroups(1)[0])
    return total.tolist(), nan[1:].tolist(), alone.item(), alone.dim()


def test_a_few_values_add_up_in_the_order_of_ranks() -> None:
    wanted = (1e16 + 1.0) - 1e16  # another order gives 1
    for rank, found in enumerate(in_ranks(3, add)):
        assert found == ([wanted, torch.inf], [3.0], float(rank), 0)
