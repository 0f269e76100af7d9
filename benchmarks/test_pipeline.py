"""The local engine on two CPU stages of one core each, beside the simulator's bound and its peers.

All rows of one dtype come from one run on the decoder LM of ``pipeline_model.py``. Each peer is a process of its own
that does a step when it is told to: all take turns, so that what else runs on the machine falls on everybody, and
ratios are medians over the rounds. Two bounds are printed: the schedule simulated with the durations that its own
actions had (what the engine lost), and ``2 * T1 * m / (m + 1)``, where T1 is one core's rate (what two cores lost
besides).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_model as lm
import pytest
from goals import GOALS
from host_side import HostSide
from ports import free_port
from torch import nn

from spu import DeviceManager, ModelParallelTrainer, schedules
from spu.engine import local
from spu.engine.local import Worker
from spu.schedules import Span, simulate
from spu.transfer import side_for

PEERS = Path(__file__).with_name("pipeline_peers.py")
ROUNDS = 3

pytestmark = pytest.mark.skipif(os.cpu_count() is None or os.cpu_count() < 2, reason="needs two cores")


class Peer:
    """A peer's process, or processes, that wait to be told to do a step."""

    def __init__(self, name: str, dtype: str) -> None:
        arguments: list[list[str]] = [[]]
        if name == "torch-pipelining":
            port = str(free_port())
            arguments = [["0", port], ["1", port]]
        environment = {**os.environ, "OMP_NUM_THREADS": "2" if name == "two-threads" else "1"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, str(PEERS), name, dtype, *own],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )
            for own in arguments
        ]  # fmt: skip

    def step(self) -> float:
        """Seconds of one step."""
        first = self._ranks[0]
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write("\n")
        first.stdin.flush()
        return float(first.stdout.readline())

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()


def make_trainer(dtype: str, devices: int, **how: Any) -> ModelParallelTrainer:
    pinned = [dataclasses.replace(d, threads=1) for d in DeviceManager().get_devices(["cpu:0", "cpu:1"][:devices])]
    return ModelParallelTrainer(
        lm.make_layers(), pinned, loss_fn=lm.loss_fn, precision=dtype, lr=1e-4, recompute=False,
        **{"microbatches": lm.MICROBATCHES, **how},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_stages_beside_their_bounds_and_peers(dtype: str) -> None:
    if dtype == "bf16" and not lm.has_bf16_instructions():
        pytest.skip("this CPU has no bf16 instructions; torch takes minutes for a step without them")
    x, y = lm.make_batch()
    names = ("one-core", "two-threads", "torch-pipelining", "gpipe")
    seconds: dict[str, list[float]] = {}
    packed, own = [], []
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(make_trainer(dtype, 2))
        chosen = stack.enter_context(make_trainer(dtype, 2, schedule="auto", microbatches="auto"))
        peers = {name: Peer(name, dtype) for name in names}
        for peer in peers.values():
            stack.callback(peer.close)
        chosen.prepare(x, y)
        for round_ in range(ROUNDS + 1):
            last = round_ == ROUNDS  # no target hangs on two threads: once is enough
            found = {name: peer.step() for name, peer in peers.items() if name != "two-threads" or last}
            found["spu"], found["chosen"] = plain.step(x, y).seconds, chosen.step(x, y).seconds
            if not round_:
                continue  # warms up
            for name, value in found.items():
                seconds.setdefault(name, []).append(value)
            for trainer, shares in ((plain, packed), (chosen, own)):
                timeline = trainer.timeline()
                bound = simulate(trainer.plan.actions(), {span[:3]: span.seconds for span in timeline.spans})
                shares.append(bound.makespan / timeline.makespan)
        plan = chosen.plan

    def ratio(name: str, ours: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name][::-1], seconds[ours][::-1]))

    m, n = lm.MICROBATCHES, plan.settings.run_microbatches
    GOALS.head(f"decoder LM, {dtype}, 16 x {x.shape[1]} tokens, plain torch ops, 2 stages of one core")
    for name, values in seconds.items():
        GOALS.note(f"{name}, tokens/s", f"{x.numel() / statistics.median(values):.0f}")
    GOALS.at_least(f"1f1b, {m} microbatches: of the bound for its own actions", statistics.median(packed), 0.96, "%")
    GOALS.note("  of 2 T1 m / (m + 1)", f"{100 * ratio('one-core', 'spu') * (m + 1) / (2 * m):.1f}%")
    GOALS.at_least("  beside torch.distributed.pipelining 1F1B", ratio("torch-pipelining", "spu"), 1.05, "x")
    which = "torchgpipe" if importlib.util.find_spec("torchgpipe") else "torchgpipe's way"
    GOALS.at_least(f"  beside {which}", ratio("gpipe", "spu"), 1.4, "x")
    GOALS.note("  beside one process with two threads", f"{ratio('two-threads', 'spu'):.2f}x")
    how = f"the planner's choice ({plan.settings.schedule}, {n} microbatches)"
    GOALS.at_least(f"{how}: beside torch pipelining", ratio("torch-pipelining", "chosen"), 1.08, "x")
    GOALS.at_least("  of 2 T1 m / (m + 1)", ratio("one-core", "chosen") * (n + 1) / (2 * n), 0.96, "%")
    GOALS.note("  of the bound for its own actions", f"{100 * statistics.median(own):.1f}%")


def test_engine_overhead_on_one_core() -> None:
    """One stage on one core, beside the same forwards and backwards called directly on a thread of the same kind.

    Compared is the processor time of the whole process, which other programs on the machine do not add to; pairs are
    measured in turn and in both orders, and the figure is the median of their ratios.
    """
    x, y = lm.make_batch()
    x, y = x[:8, :128].contiguous(), y[:8, :128].contiguous()
    model = nn.Sequential(*lm.make_layers())
    ratios, waits = [], []
    with make_trainer("fp32", 1) as trainer:
        trainer.prepare(x, y)
        worker = Worker(trainer.devices[0])

        def ours() -> None:
            trainer._prepared().accumulate(x, y, seed=0, step=0)

        def direct() -> None:
            model.zero_grad()
            worker.submit(lm.plain_pass, model, x, y).result()

        def seconds(what: Callable[[], None]) -> float:
            begin = time.process_time()
            what()
            return time.process_time() - begin

        for pair in range(2 * ROUNDS + 2):
            first, second = (ours, direct) if pair % 2 else (direct, ours)
            took = {first: seconds(first), second: seconds(second)}
            if pair > 1:
                ratios.append(took[ours] / took[direct])
        trainer.forward_backward(x, y)
        waits.append(trainer.timeline().idle_share)
        worker.close()
    GOALS.head("the engine")
    GOALS.at_most("overhead beside the same calls made directly, one core", statistics.median(ratios) - 1, 0.03, "%")
    GOALS.note("  between actions, of the time", f"{100 * waits[0]:.3f}%")


def test_the_cost_of_recording_the_timeline() -> None:
    """Two clock readings and one span for each action."""
    count = 20_000
    spans = []
    begin = time.perf_counter()
    for i in range(count):
        start = time.perf_counter()
        spans.append(Span(0, "F", i, start, time.perf_counter()))
    each = (time.perf_counter() - begin) / count
    GOALS.note("recording an action in the timeline", f"{1e6 * each:.1f} us")


@pytest.mark.parametrize("name", schedules.names())
def test_the_cost_of_making_a_schedule(name: str) -> None:
    """What a planner asks for many times."""
    begin = time.perf_counter()
    actions = schedules.get(name)(8, 64)
    made = time.perf_counter()
    simulate(actions, [(1.0, 1.0, 1.0)] * len(schedules.stage_ranks(name, 8)))
    ended = time.perf_counter()
    GOALS.note(
        f"{name}, 8 devices, 64 microbatches: made, simulated",
        f"{1e3 * (made - begin):.1f} ms, {1e3 * (ended - made):.1f} ms",
    )


def test_packing_beside_cpu_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 between two CPU stages: packed by the stages, or by threads beside them, without cores of their own."""
    x, y = lm.make_batch()
    x, y = x[:, :64].contiguous(), y[:, :64].contiguous()
    with contextlib.ExitStack() as stack:
        trainers = []
        for make in (side_for, HostSide):
            with monkeypatch.context() as patch:
                patch.setattr(local, "side_for", make)
                trainers.append(stack.enter_context(make_trainer("fp32", 2, transfer="int8")))
                trainers[-1].prepare(x, y)
        took = [[trainer.step(x, y).seconds for trainer in trainers] for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(a / b for a, b in took)
    GOALS.note("int8, packed on threads beside the stages instead of by them", f"{ratio:.2f}x the speed")
