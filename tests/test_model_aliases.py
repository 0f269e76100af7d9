"""Tensors over one memory: which overlap, and that a trainer refuses two parameters that do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spu import ModelParallelTrainer
from spu.common.absent import absent
from spu.model.aliases import overlapping


def test_overlapping_tensors_are_found() -> None:
    whole = torch.zeros(4, 6)
    assert overlapping([torch.zeros(3), whole, whole.view(24)]) == (1, 2)
    assert overlapping([whole[1], torch.zeros(3), whole]) == (0, 2)
    assert overlapping([whole[:2], whole[1:3]]) == (0, 1)
    assert overlapping([whole, whole.t()]) == (0, 1)


def test_what_only_lies_in_the_same_storage_does_not_overlap() -> None:
    whole = torch.zeros(4, 6)
    assert overlapping([whole[:2], whole[2:]]) is None
    assert overlapping([whole[:, :3], whole[:, 3:]]) is None  # columns: the rows of one lie between those of the other
    assert overlapping([whole, whole]) is None  # one tensor, in two places
    assert overlapping([whole[:0], whole, torch.zeros(0)]) is None
    assert overlapping([absent((3, 4), torch.float32), absent((3, 4), torch.float32)]) is None


def assigned(*, trained: bool = True) -> nn.Sequential:
    """Return a model whose head was tied to the embedding before its state was assigned to this one."""
    tied = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11, bias=False))
    tied[2].weight = tied[0].weight
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11, bias=False))
    model.load_state_dict(tied.state_dict(), assign=True)
    return model.requires_grad_(trained)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_parameters_over_one_memory_are_refused(devices: int) -> None:
    """Two stages would update one memory side by side, and 16 bits would make it two, as plain torch does not."""
    x, y = torch.arange(8), torch.arange(8)
    refused = pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' are two parameters over one memory")
    with ModelParallelTrainer(assigned(), ["cpu"] * devices, precision="fp32") as trainer, refused:
        trainer.step(x, y)
    model = assigned()
    model[2].weight = model[0].weight
    with ModelParallelTrainer(model, ["cpu"] * devices, precision="fp32") as trainer:
        assert trainer.step(x, y).loss > 0


def test_frozen_parameters_may_share_memory() -> None:
    model = nn.Sequential(*assigned(trained=False), nn.Linear(11, 11))
    with ModelParallelTrainer(model, ["cpu", "cpu"], precision="fp32") as trainer:
        assert trainer.step(torch.arange(8), torch.arange(8)).loss > 0
