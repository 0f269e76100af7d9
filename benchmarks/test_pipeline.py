"""The local engine on two CPU stages of one core each, beside the simulator's bound and its peers.

All rows of one dtype come from one run on the decoder LM of ``pipeline_model.py``; each peer is a process of its own.
A figure is the best of a few steps after one that warms up: steps take seconds, and other work on the machine only
ever adds to them. Two bounds are printed: the schedule simulated with the durations that its own actions had (what the
engine lost), and ``2 * T1 * m / (m + 1)``, where T1 is one core's rate (what two cores lost besides).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline_model as lm
import pytest
import torch
from torch import nn

from spu import DeviceManager, ModelParallelTrainer, schedules
from spu.engine.worker import Worker
from spu.schedules import Span, simulate

PEERS = Path(__file__).with_name("pipeline_peers.py")
STEPS = 3  # the first warms up

pytestmark = pytest.mark.skipif(os.cpu_count() is None or os.cpu_count() < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines that are printed when the module is done."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))


def peer_seconds(peer: str, dtype: str, steps: int = STEPS) -> float:
    """Best seconds of a step of a peer, after its first."""
    arguments = [[]]
    if peer == "torch-pipelining":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = [["0", port], ["1", port]]
    environment = {**os.environ, "OMP_NUM_THREADS": "2" if peer == "two-threads" else "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PEERS), peer, dtype, str(steps), *own], stdout=subprocess.PIPE, env=environment
        )
        for own in arguments
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), f"{peer} failed"
    return min(json.loads(outputs[0])[1:])


def make_trainer(dtype: str, devices: int, **how: Any) -> ModelParallelTrainer:
    pinned = [dataclasses.replace(d, threads=1) for d in DeviceManager().get_devices(["cpu:0", "cpu:1"][:devices])]
    return ModelParallelTrainer(
        lm.make_layers(), pinned, loss_fn=lm.loss_fn, precision=dtype, microbatches=lm.MICROBATCHES, lr=1e-4,
        recompute=False, **how,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_stages_beside_their_bounds_and_peers(dtype: str, table: list[str]) -> None:
    x, y = lm.make_batch(lm.DTYPES[dtype])
    seconds, packed = [], []
    one_core = peer_seconds("one-core", dtype, 2)
    with make_trainer(dtype, 2) as trainer:
        for _ in range(STEPS):
            begin = time.perf_counter()
            trainer.step(x, y)
            seconds.append(time.perf_counter() - begin)
            timeline = trainer.timeline()
            bound = simulate(trainer.plan.actions(), {span[:3]: span.seconds for span in timeline.spans})
            packed.append(bound.makespan / timeline.makespan)
    ours = min(seconds[1:])
    m = lm.MICROBATCHES
    rows = {"spu 1f1b, 2 x 1 core": ours, "one core": one_core}
    rows["two threads"] = peer_seconds("two-threads", dtype, 2)
    rows["torch.distributed.pipelining 1F1B"] = peer_seconds("torch-pipelining", dtype)
    if importlib.util.find_spec("torchgpipe") is not None:
        rows["torchgpipe"] = peer_seconds("torchgpipe", dtype, 2)
    tokens = x.numel()
    table.append(f"decoder LM, {dtype}, 16 x {x.shape[1]} tokens in {m} microbatches, plain torch ops")
    for name, value in rows.items():
        table.append(f"  {name:36} {value:7.3f} s/step {tokens / value:8.0f} tokens/s   spu is {value / ours:5.3f}x")
    table.append(f"  of the bound for its own actions     {100 * max(packed[1:]):6.2f}%")
    table.append(f"  of 2 * T1 * m / (m + 1)              {100 * one_core * (m + 1) / (2 * m * ours):6.2f}%")


def test_engine_overhead_on_one_core(table: list[str]) -> None:
    """One stage on one core, beside the same forwards and backwards called directly on a thread of the same kind.

    Compared is the processor time of the whole process, which other programs on the machine do not add to.
    """
    x, y = lm.make_batch(torch.float32)
    x, y = x[:, :128].contiguous(), y[:, :128].contiguous()
    ours, direct, waits = [], [], []
    model = nn.Sequential(*lm.make_layers())
    with make_trainer("fp32", 1) as trainer:
        worker = Worker(trainer.devices[0])
        for _ in range(5):  # in turn, so that both see the same machine
            begin = time.process_time()
            trainer.forward_backward(x, y)
            ours.append(time.process_time() - begin)
            waits.append(trainer.timeline().idle_share)
            begin = time.process_time()
            model.zero_grad()
            worker.submit(lm.plain_pass, model, x, y).result()
            direct.append(time.process_time() - begin)
        worker.close()
    overhead = statistics.median(a / b for a, b in zip(ours[1:], direct[1:], strict=True)) - 1
    table.append(
        f"engine on one core: {min(ours[1:]):.3f} s, called directly {min(direct[1:]):.3f} s: median overhead "
        f"{100 * overhead:.2f}%; between actions {100 * min(waits[1:]):.3f}% of the time"
    )


def test_the_cost_of_recording_the_timeline(table: list[str]) -> None:
    """Two clock readings and one span for each action."""
    count = 20_000
    spans = []
    begin = time.perf_counter()
    for i in range(count):
        start = time.perf_counter()
        spans.append(Span(0, "F", i, start, time.perf_counter()))
    each = (time.perf_counter() - begin) / count
    table.append(f"recording an action: {1e9 * each:.0f} ns")


@pytest.mark.parametrize("name", schedules.names())
def test_the_cost_of_making_a_schedule(name: str, table: list[str]) -> None:
    """80 stages would be too many; 8 devices and 64 microbatches are what a planner asks for, many times."""
    begin = time.perf_counter()
    actions = schedules.get(name)(8, 64)
    made = time.perf_counter()
    simulate(actions, [(1.0, 1.0, 1.0)] * len(schedules.stage_ranks(name, 8)))
    ended = time.perf_counter()
    table.append(
        f"{name:12} 8 devices, 64 microbatches: made in {1e3 * (made - begin):6.2f} ms, simulated in "
        f"{1e3 * (ended - made):6.2f} ms"
    )
