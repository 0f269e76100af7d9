"""What of a streamed stage is moved to its device, and what stays on the host."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from streamed_runs import Tied
from torch import nn

from spu import Device, DeviceManager
from spu.engine.below import hosted_stages, move_rest, weights_below
from spu.engine.build import build_stages
from spu.engine.loss import cross_entropy
from spu.model.layers import Layer

META = torch.device("meta")


def gpu() -> Device:
    """A device that is no CPU: its tensors have no memory, but they say where they are."""
    (device,) = DeviceManager().get_devices("cpu")
    return dataclasses.replace(device, name="cuda:0", torch_device=META)


def layers() -> list[Layer]:
    embedding = nn.Embedding(11, 4)
    middle = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    middle[0].bias.requires_grad_(False)
    return [Layer(str(k), module) for k, module in enumerate((embedding, middle, Tied(embedding.weight)))]


def test_only_what_stays_on_the_gpu_is_moved_there() -> None:
    own, device = layers(), gpu()
    before = [p.data_ptr() for layer in own for _, p in layer.named_parameters()]
    ranges = [range(k, k + 1) for k in range(3)]
    built = build_stages(own, ranges, [device] * 3, loss_fn=cross_entropy, residencies=["streamed"] * 3)
    found = [p for layer in own for _, p in layer.named_parameters()]
    assert [p.data_ptr() for p in found] == before
    assert all(p.device.type == "cpu" for p in found)
    (use,) = built.tied
    assert use.alias.data_ptr() == use.owner.data_ptr()
    assert {buffer.device for _, buffer in own[1].named_buffers()} == {META}
    assert [list(names) for names in built.owned] == [["0.weight"], ["1.0.weight", "1.1.weight", "1.1.bias"], []]


def test_an_offloaded_stage_keeps_its_frozen_weights_on_the_gpu() -> None:
    own = layers()
    stages = [[p for _, p in layer.named_parameters()] for layer in own[:2]]
    below = weights_below(stages, [], ["offloaded"] * 2, host_updates=True)
    frozen = own[1].module.get_parameter("0.bias")
    assert [id(p) for p in stages[1] if id(p) not in below[1]] == [id(frozen)]
    assert below[0].keys() == {id(p) for p in stages[0]}
    assert weights_below(stages, [], ["offloaded"] * 2, host_updates=False) == [{}, {}]
    assert [len(b) for b in weights_below(stages, [], ["resident", "streamed"], host_updates=True)] == [0, 4]


def test_a_move_that_fails_loses_nothing() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
            raise RuntimeError("not me")

    own = [Layer("0", Stubborn())]
    weight = own[0].module.get_parameter("weight")
    with pytest.raises(RuntimeError, match="not me"):
        move_rest(own, {id(weight): weight}, META)
    assert own[0].module.get_parameter("weight") is weight


def test_only_stages_below_a_gpu_are_updated_by_the_host() -> None:
    (cpu,) = DeviceManager().get_devices("cpu")
    how = ["resident", "offloaded", "streamed"]
    assert hosted_stages([gpu()] * 3, how) == {1, 2}
    assert hosted_stages([cpu] * 3, how) == set()
    assert hosted_stages([gpu()] * 3, ()) == set()
