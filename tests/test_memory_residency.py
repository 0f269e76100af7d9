"""Residency: a stage's weights are read between fetch and release, and only there."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from pipelines import batch, every_schedule, trainer, with_and_without_recompute
from torch import nn

from spu import schedules
from spu.engine.stage import Stage
from spu.memory.residency import RESIDENT, Visit, visits_of


class Parked:
    """Keeps the weights elsewhere: what reads them without a fetch reads NaN, and what writes them is undone."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.kept: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        self.calls: list[str] = []
        self.visits: list[Visit] = []

    def begin(self, visits: Sequence[Visit]) -> None:
        self.calls.append("begin")
        self.visits = list(visits)

    def fetch(self, visit: Visit) -> None:
        self.calls.append("fetch")
        assert visit == self.visits[0]
        for parameter in self.stages[visit.stage].parameters():
            if id(parameter) in self.kept:
                parameter.data.copy_(self.kept.pop(id(parameter))[1])

    def release(self, visit: Visit) -> None:
        self.calls.append("release")
        assert visit == self.visits.pop(0)
        for parameter in self.stages[visit.stage].parameters():
            assert id(parameter) not in self.kept, "released twice"
            self.kept[id(parameter)] = parameter, parameter.detach().clone()
            parameter.data.fill_(torch.nan)

    def end(self) -> None:
        self.calls.append("end")
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
            engine = t._runner.engine
            assert engine.residencies == [RESIDENT] * ranks
            if parked:
                engine.residencies = [Parked(engine.stages) for _ in range(ranks)]
            loss, _ = t.forward_backward(x, y)
            for residency in engine.residencies if parked else ():
                calls = residency.calls
                assert 2 * calls.count("fetch") == 2 * calls.count("release") == len(calls) - 2 > 0
                assert calls[0] == "begin"
                assert calls[-1] == "end"
                assert residency.visits == []
            gradients = [p.grad.clone() for p in own.parameters()]
            evaluated = t.evaluate(x, y)
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
        parked = Parked(t._runner.engine.stages)
        t._runner.engine.residencies = [parked]
        own[1].forward = Fails().forward  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the layer's own error"):
            t.forward_backward(x, y)
        assert parked.calls == ["begin", "fetch", "end"]


def test_visits_are_consecutive_actions_of_one_stage() -> None:
    (actions,) = schedules.get("layer_outer")(1, 2, virtual=3)
    found = visits_of(actions)
    assert [tuple(visit) for visit, _ in found] == [(0, False), (1, False), (2, True), (1, True), (0, True)]
    assert [action for _, own in found for action in own] == actions
