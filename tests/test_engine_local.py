"""The local engine: side by side workers, exchange, interruption, timelines."""

from __future__ import annotations

import contextvars
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from host_side import HostSide
from torch import nn

from spu import DeviceManager, ModelParallelTrainer, StageError, schedules
from spu.engine import local
from spu.engine.channel import Aborted, Exchange
from spu.engine.local import Worker
from spu.engine.stage import Stage
from spu.model.layers import DrawKey
from spu.precision import parameter_sink
from spu.transfer import Link


class Sleep(nn.Module):
    """Takes a fixed time forward and twice that backward, without using a core."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return _Calls.apply(x * self.scale, lambda: time.sleep(2 * self.seconds))


class _Calls(torch.autograd.Function):
    """Hands its input on, and calls a function in the backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, function: Callable[[], None]) -> torch.Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.function()
        return gradient, None


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_stages_run_side_by_side_in_the_schedules_order(schedule: str) -> None:
    with ModelParallelTrainer(
        [Sleep(0.02), Sleep(0.02)],
        DeviceManager().get_devices(["cpu", "cpu"]),
        precision="fp32",
        microbatches=4,
        schedule=schedule,
        loss_fn=lambda out, y: out.mean(),
        loss_weight=lambda y: len(y),
        recompute=False,
    ) as trainer:
        trainer.step(torch.randn(4, 3), torch.zeros(4, 3))
        timeline = trainer.timeline()
    ran = [[(span.kind, span.microbatch) for span in timeline.of(stage)] for stage in range(2)]
    planned = schedules.get(schedule)(2, 4)
    assert ran == [[(action.kind, action.microbatch) for action in own] for own in planned]
    # 8 actions of 0.02 or 0.04 s on each stage: one after the other they would take 0.48 s, side by side 0.3 s.
    overlap = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in timeline.of(0) for b in timeline.of(1))
    assert overlap > 0.1
    for before, after in zip(range(4), range(4)):
        sent = next(s for s in timeline.of(0) if (s.kind, s.microbatch) == ("F", before))
        received = next(s for s in timeline.of(1) if (s.kind, s.microbatch) == ("F", after))
        assert received.start >= sent.end - 1e-4


def test_what_a_stage_waits_for_is_no_work_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that runs beside the stages' work is waited for before the action begins."""
    monkeypatch.setattr(local, "side_for", HostSide)
    copy = Link._copy

    def slow(self: Link, tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return copy(self, tensor)

    monkeypatch.setattr(Link, "_copy", slow)
    with ModelParallelTrainer(
        [nn.Linear(3, 3), nn.Linear(3, 3)],
        DeviceManager().get_devices(["cpu", "cpu"]),
        precision="fp32",
        microbatches=1,
        loss_fn=nn.MSELoss(),
    ) as trainer:
        trainer.step(torch.randn(4, 3), torch.zeros(4, 3))
        timeline = trainer.timeline()
    first, second = ({span.kind: span for span in timeline.of(stage)} for stage in range(2))
    assert second["F"].start - first["F"].end > 0.49
    assert first["B"].start - second["B"].end > 0.49
    assert max(timeline.busy) < 0.4


class Fails(nn.Module):
    """A linear layer that raises where it is told to, at its fourth call."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.where = where
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.maybe_fail("forward")
        return _Calls.apply(self.linear(x), lambda: self.maybe_fail("backward"))

    def maybe_fail(self, where: str) -> None:
        self.calls += where == self.where
        if where == self.where and self.calls == 4:
            self.failed_at = time.perf_counter()
            raise ArithmeticError("seeded failure")


@pytest.mark.parametrize(
    ("schedule", "kind", "where"),
    [
        ("1f1b", "F", "forward"),
        ("1f1b", "B", "backward"),
        ("zb", "I", "backward"),
        ("zb", "W", "weight"),
        ("zbv", "F", "forward"),
        ("zbv", "I", "backward"),
        ("interleaved", "B", "backward"),
        ("layer_outer", "F", "forward"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_in_any_action_stops_everything_at_once(
    schedule: str, kind: str, where: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = schedules.stages_per_rank(schedule)
    layers: list[nn.Module] = [nn.Linear(4, 4) for _ in range(2 * each)]
    stage = schedules.stage_ranks(schedule, 2).index(rank)
    failing = layers[stage] = Fails(where)
    if where == "weight":
        real = parameter_sink.linear_dw_

        def linear_dw_(dz: torch.Tensor, x: torch.Tensor, main_grad: torch.Tensor, *rest, **how) -> None:
            if threading.current_thread().name.startswith(f"spu cpu:{rank}"):
                failing.maybe_fail("weight")
            real(dz, x, main_grad, *rest, **how)

        monkeypatch.setattr(parameter_sink, "linear_dw_", linear_dw_)
    x, y = torch.randn(8, 4), torch.randint(4, (8,))
    with ModelParallelTrainer(
        layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=8, schedule=schedule
    ) as trainer:
        trainer.prepare(x, y)
        failing.calls = 0  # planning has called it
        with pytest.raises(StageError) as caught:
            trainer.step(x, y)
        assert time.perf_counter() - failing.failed_at < 1.0
        action = schedules.Action(stage, kind, 3)
        assert caught.value.action == action
        assert str(caught.value) == (
            f"stage {stage} (cpu:{rank}), action {action}, microbatch 3: ArithmeticError: seeded failure"
        )
        assert all(p.grad is None for p in trainer.parameters())
        failing.calls = 100
        assert trainer.step(x, y).loss > 0.0  # it can go on


@pytest.mark.parametrize("schedule", ["zb", "zbv"])
def test_weight_gradients_of_linear_layers_are_computed_in_w(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In W and nowhere else, once for each linear layer and microbatch."""
    real_product, real_action = parameter_sink.linear_dw_, Stage.weight_backward
    running = threading.local()
    places: list[bool] = []

    def linear_dw_(*operands, **how) -> None:
        places.append(getattr(running, "w", False))
        real_product(*operands, **how)

    def weight_backward(self: Stage, key: DrawKey) -> None:
        running.w = True
        real_action(self, key)
        running.w = False

    monkeypatch.setattr(parameter_sink, "linear_dw_", linear_dw_)
    monkeypatch.setattr(Stage, "weight_backward", weight_backward)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    with ModelParallelTrainer(
        layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=3, schedule=schedule
    ) as trainer:
        x, y = torch.randn(6, 4), torch.randint(4, (6,))
        trainer.prepare(x, y)
        places.clear()  # planning has run the layers on fakes
        trainer.forward_backward(x, y)
    assert places == [True] * (3 * 4)


def test_a_worker_has_its_devices_cores_and_threads() -> None:
    device = dataclasses.replace(DeviceManager().get_devices(["cpu", "cpu"])[0], threads=1)
    worker = Worker(device)
    try:
        assert worker.submit(torch.get_num_threads).result() == 1
        if hasattr(os, "sched_getaffinity"):
            assert worker.submit(os.sched_getaffinity, 0).result() == set(device.cores)
            assert os.sched_getaffinity(0) >= set(device.cores)
    finally:
        worker.close()
        worker.close()
    assert not any(t.name.startswith("spu") for t in threading.enumerate())


FACTOR: contextvars.ContextVar[float] = contextvars.ContextVar("FACTOR", default=1.0)


class Factor(nn.Module):
    """Multiplies by what the caller has set in a context variable, as a library's settings are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * FACTOR.get()


def test_layers_see_the_callers_context_variables() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Factor(), nn.Linear(8, 3), Factor())
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    plain = [nn.functional.cross_entropy(_with_factor(f, model, x), y).item() for f in (1.0, 3.0)]
    with ModelParallelTrainer(model, ["cpu", "cpu"], precision="fp32", microbatches=1) as trainer:
        for factor, loss in zip((1.0, 3.0), plain, strict=True):
            token = FACTOR.set(factor)
            assert float(trainer.evaluate(x, y)) == loss
            FACTOR.reset(token)
        assert FACTOR.get() == 1.0


def _with_factor(factor: float, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return contextvars.copy_context().run(lambda: (FACTOR.set(factor), model(x))[1])


class Raising(nn.Module):
    """Raises what it is given to, once, in its forward or in its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self.backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        if self.backward and out.requires_grad:
            out.register_hook(lambda _: self._raise())
        elif not self.backward:
            self._raise()
        return out

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt("user's"), SystemExit(3), GeneratorExit()], ids=repr)
def test_an_exit_in_the_users_code_stays_one(error: BaseException, backward: bool) -> None:
    """It ended as a StageError, which an ``except Exception`` takes, and after which a process exits with 1."""
    torch.manual_seed(0)
    raising = Raising()
    raising.backward = backward
    model = nn.Sequential(nn.Linear(4, 8), raising, nn.Linear(8, 3))
    plain = nn.Sequential(*(nn.Linear(4, 8), nn.Linear(8, 3)))
    plain.load_state_dict({name.replace("2.", "1."): value.clone() for name, value in model.state_dict().items()})
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    losses = []
    optimizer = partial(torch.optim.SGD, lr=0.1)
    with ModelParallelTrainer(model, ["cpu", "cpu"], precision="fp32", microbatches=4, optimizer=optimizer) as trainer:
        trainer.prepare(x, y)
        raising.error = error
        with pytest.raises(type(error)) as ended:
            trainer.step(x, y)
        assert ended.value is error
        losses = [float(trainer.step(x, y).loss) for _ in range(2)]  # it goes on as if nothing had been
    plain_optimizer = optimizer(plain.parameters())
    for loss in losses:
        expected = nn.functional.cross_entropy(plain(x), y)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        plain_optimizer.zero_grad()
        expected.backward()
        plain_optimizer.step()


def test_an_abort_wakes_a_waiting_worker() -> None:
    exchange = Exchange()
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(exchange.take("never"))
        except Aborted as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    exchange.put("other", 1)
    assert len(exchange) == 1
    exchange.abort()
    thread.join(5)
    assert isinstance(outcome[0], Aborted)
    with pytest.raises(Aborted):
        exchange.take("other")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_cleanly() -> None:
    script = textwrap.dedent(
        """
        import signal, sys, threading, time, torch
        from torch import nn
        from spu import ModelParallelTrainer

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored

        class Slow(nn.Linear):
            def forward(self, x):
                time.sleep(0.05)
                return super().forward(x)

        trainer = ModelParallelTrainer(
            [Slow(4, 4) for _ in range(4)], ["cpu:0", "cpu:1"], precision="fp32", microbatches=8, schedule="zbv"
        )
        x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        trainer.prepare(x, y)
        print("ready", flush=True)
        try:
            while True:
                trainer.step(x, y)
        except KeyboardInterrupt:
            assert all(p.grad is None for p in trainer.parameters())
            trainer.step(x, y)  # it can go on
            trainer.close()
            print("clean", [t.name for t in threading.enumerate()], flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.strip() == "clean ['MainThread']"
    assert process.returncode == 0


def test_a_dropped_trainer_leaves_no_thread() -> None:
    trainer = ModelParallelTrainer([nn.Linear(4, 4), nn.Linear(4, 4)], ["cpu:0", "cpu:1"], microbatches=2)
    trainer.step(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    del trainer
    import gc

    gc.collect()
    deadline = time.time() + 5
    while time.time() < deadline and any(t.name.startswith("spu") for t in threading.enumerate()):
        time.sleep(0.02)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("spu")]
