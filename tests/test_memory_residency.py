"""Residency: a stage fetches a layer's weights before all of its work, and only then."""

from __future__ import annotations

import copy

import pytest
import torch
from pipelines import batch, every_schedule, reference, trainer, with_and_without_recompute
from torch import nn

from spu.memory.residency import RESIDENT

__all__ = ["reference"]


class Parked:
    """Keeps the weights elsewhere: what reads them without a fetch reads NaN, and what writes them is undone."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        self.calls: list[str] = []

    def fetch(self, module: nn.Module) -> None:
        self.calls.append("fetch")
        for parameter in module.parameters():
            if id(parameter) in self.kept:
                parameter.data.copy_(self.kept.pop(id(parameter))[1])

    def release(self, module: nn.Module) -> None:
        self.calls.append("release")
        for parameter in module.parameters():
            assert id(parameter) not in self.kept, "released twice"
            self.kept[id(parameter)] = parameter, parameter.detach().clone()
            parameter.data.fill_(torch.nan)

    def give_back(self) -> None:
        for parameter, value in self.kept.values():
            parameter.data.copy_(value)
        self.kept.clear()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 12), nn.Dropout(), nn.Linear(12, 4)
    )


@every_schedule
@with_and_without_recompute
def test_weights_are_read_only_between_fetch_and_release(
    reference: None, schedule: str, ranks: int, virtual: int, recompute: bool
) -> None:
    x, y = batch()
    precision = "fp16" if recompute else "fp32"
    results = []
    for parked in (False, True):
        own = copy.deepcopy(model())
        settings = {"schedule": schedule, "virtual": virtual, "recompute": recompute, "precision": precision}
        with trainer(own, ranks, **settings) as t:
            t.prepare(x, y)
            assert t._runner is not None
            residencies = []
            for stage in t._runner.built.stages:
                assert stage.residency is RESIDENT
                if parked:
                    stage.residency = Parked()
                    residencies.append(stage.residency)
            loss, _ = t.forward_backward(x, y)
            for residency in residencies:
                assert residency.calls.count("fetch") == residency.calls.count("release") > 0
                residency.give_back()
            gradients = [p.grad.clone() for p in own.parameters()]
            evaluated = t.evaluate(x, y)
            for residency in residencies:
                residency.give_back()
            results.append((loss, evaluated, gradients))
    plain, parked_result = results
    assert torch.equal(plain[0], parked_result[0])
    assert plain[1] == parked_result[1]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], parked_result[2], strict=True))
    assert all(gradient.isfinite().all() for gradient in plain[2])


def test_weights_are_released_when_a_layer_fails(reference: None) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("the layer's own error")

    x, y = batch()
    own = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    with trainer(own, 1) as t:
        t.prepare(x, y)
        assert t._runner is not None
        (stage,) = t._runner.built.stages
        stage.residency = parked = Parked()
        own[1].forward = Fails().forward  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the layer's own error"):
            t.forward_backward(x, y)
        assert parked.calls == ["fetch", "release"] * 2
        parked.give_back()
