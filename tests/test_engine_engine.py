"""The engine's protocol: another engine serves the same runner, with the same numbers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pipelines import batch, every_schedule, trainer
from torch import nn

from spu.common.tracker import Tally
from spu.engine.engine import Engine, MarkedSpan, Recording, Round
from spu.engine.local import LocalEngine
from spu.engine.runner import Runner
from spu.engine.stage import Stage
from spu.model.layers import DrawKey
from spu.schedules import Action


class SerialEngine:
    """Runs the actions of all ranks one after another in the calling thread, each as soon as its inputs are there."""

    def __init__(
        self, stages: Sequence[Stage], ranks: Sequence[int], *, codecs: Any = None, backend: str | None = None
    ) -> None:
        self.stages, self.ranks, self.backend = list(stages), list(ranks), backend
        self.tallies: list[Tally] | None = None
        self.here = frozenset(ranks)
        self.closed = False

    def run(self, work: Round) -> Recording:
        queues = [list(own) for own in work.actions]
        messages: dict[tuple[str, int, int], Any] = {}
        spans: list[MarkedSpan] = []
        start = time.perf_counter()
        try:
            while any(queues):
                queue = next(q for q in queues if q and self._ready(q[0], messages))
                action = queue.pop(0)
                begin = time.perf_counter()
                with torch.set_grad_enabled(work.train):
                    self._perform(action, work, messages)
                spans.append(MarkedSpan(action, begin, time.perf_counter()))
        finally:
            for stage in self.stages:
                stage.clear()
        return Recording(self.stages, self.ranks, start, spans)

    def _ready(self, action: Action, messages: dict[tuple[str, int, int], Any]) -> bool:
        first, last = action.stage == 0, action.stage == len(self.stages) - 1
        if action.kind == "F":
            return first or ("F", action.stage, action.microbatch) in messages
        return action.kind == "W" or last or ("B", action.stage, action.microbatch) in messages

    def _perform(self, action: Action, work: Round, messages: dict[tuple[str, int, int], Any]) -> None:
        stage, index = self.stages[action.stage], action.microbatch
        key = DrawKey(work.run_seed, work.step, work.first_microbatch + index)
        if action.kind == "W":
            stage.weight_backward(key)
        elif action.kind == "F":
            x = work.inputs[index] if stage.is_first else messages.pop(("F", stage.index, index))
            out = stage.forward(x, work.inputs[index], key, train=work.train)
            if not stage.is_last:
                messages["F", stage.index + 1, index] = out
                return
            assert work.targets is not None
            assert work.weights is not None
            scope = work.scopes[stage.index] if work.scopes is not None else None
            work.losses[index] = stage.loss(out, work.targets[index], work.weights[index], key, scope)
            if work.keep_outputs:
                work.outputs[index] = out.detach()
        else:
            assert work.scopes is not None
            gradients = None if stage.is_last else messages.pop(("B", stage.index, index))
            gradients = stage.backward(gradients, key, work.scopes[stage.index], defer=action.kind == "I")
            if not stage.is_first:
                messages["B", stage.index - 1, index] = gradients

    def each(self, task: Callable[[Stage], Any]) -> list[Any]:
        return [task(stage) for stage in self.stages]

    def close(self) -> None:
        self.closed = True


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(), nn.Linear(12, 12), nn.Linear(12, 4))


@every_schedule
def test_any_engine_gives_the_same_steps(reference: None, schedule: str, ranks: int, virtual: int) -> None:
    x, y = batch()
    results = []
    for engine in (LocalEngine, SerialEngine):
        own = copy.deepcopy(model())
        with trainer(own, ranks, schedule=schedule, virtual=virtual, lr=0.1) as t:
            t.prepare(x, y)
            assert t._runner is not None
            t._runner.engine.close()
            made: Engine = engine(t._runner.built.stages, t._runner.engine.ranks)
            t._runner.engine = t._runner.updater._engine = made
            losses = [t.step(x, y).loss for _ in range(3)]
            outputs = t.forward_backward(x, y)[1]
            results.append((losses, outputs, [p.detach().clone() for p in own.parameters()], t.evaluate(x, y)))
    local, serial = results
    assert local[0] == serial[0]
    assert local[0][0] != local[0][-1]
    assert torch.equal(local[1], serial[1])
    assert all(torch.equal(a, b) for a, b in zip(local[2], serial[2], strict=True))
    assert local[3] == serial[3]


def test_the_runner_makes_the_engine_it_is_given() -> None:
    x, y = batch()
    with trainer(model(), 2) as t:
        plan = t.prepare(x, y)
        assert t._runner is not None
        built, made = t._runner.built, []

        def engine(*args: Any, **kwargs: Any) -> Engine:
            made.append(SerialEngine(*args, **kwargs))
            return made[-1]

        t._runner.close()
        t._runner = Runner(
            built,
            plan,
            t.scaler,
            backend=None,
            weighing=t._weighing,
            optimizer=None,
            lr=None,
            max_grad_norm=None,
            engine=engine,
        )
        assert math.isfinite(t.step(x, y).loss)
    assert made[0].closed
