"""Plans beside what they promise: seconds of a step, peak bytes, splits over unequal devices, the time of planning.

Rules: layers are timed just before the steps that they predict, and a reference product beside both, by which the
machine's drift between the two is taken out; a step is the median of five after two; peak bytes are counted storage
by storage, on the CPU; brute force runs every split.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from goals import GOALS
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from memory_probe import measured_peaks

from spu import schedules
from spu.devices.manager import Device
from spu.devices.pin import side_by_side
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import make_machine, read_speeds
from spu.plan.search import search_plan
from spu.settings import Settings
from spu.train.model import quiet_transformers
from spu.trainer.trainer import ModelParallelTrainer

transformers = pytest.importorskip("transformers")

# (precision, schedule, microbatches, recompute, layers): ten plans over two CPU stages of a core each
PLANS = [
    ("fp32", "1f1b", 8, False, 6),
    ("fp32", "gpipe", 8, False, 6),
    ("fp32", "1f1b", 4, False, 6),
    ("fp32", "1f1b", 8, True, 6),
    ("fp32", "interleaved", 8, False, 6),
    ("fp32", "zb", 8, False, 6),
    ("bf16", "1f1b", 8, False, 6),
    ("fp16", "1f1b", 8, False, 4),
    ("fp16", "gpipe", 4, True, 4),
    ("fp16", "1f1b", 16, False, 4),
]


def decoder(layers: int) -> Any:
    quiet_transformers()
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def trainer_of(
    precision: str, schedule: str, microbatches: int, recompute: bool, layers: int, measure: bool = True
) -> ModelParallelTrainer:
    return ModelParallelTrainer(
        decoder(layers),
        ["cpu:0", "cpu:1"],
        precision=precision,
        schedule=schedule,
        microbatches=microbatches,
        recompute=recompute,
        measure=measure,
    )


def reference_seconds(devices: list[Device]) -> list[float]:
    """Median seconds of a product on all devices at the same time: how fast the machine is just now."""

    def body(device: Device, start: Callable[[], Any]) -> float:
        x = torch.ones(384, 384)
        samples = []
        torch.mm(x, x)
        start()
        for _ in range(15):
            begin = time.perf_counter()
            torch.mm(x, x)
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    return side_by_side(devices, body)


def test_predicted_step_time() -> None:
    ids = torch.randint(0, 1024, (16, 128))
    GOALS.head(f"predicted beside measured, {len(PLANS)} plans over two CPU stages")
    raw, errors = [], []
    for settings in PLANS:
        with trainer_of(*settings) as trainer:
            before = reference_seconds(trainer.devices)
            trainer.prepare(ids, ids)
            middle = reference_seconds(trainer.devices)
            times = [trainer.step(ids, ids).seconds for _ in range(7)][2:]
            after = reference_seconds(trainer.devices)
            measured, predicted = statistics.median(times), trainer.plan.predicted.step_s
        drift = statistics.fmean((b + c) / (a + b) for a, b, c in zip(before, middle, after))
        raw.append(abs(predicted / measured - 1))
        errors.append(abs(predicted * drift / measured - 1))
        GOALS.note(
            f"step of {settings}", f"{1e3 * predicted:.0f}, {1e3 * measured:.0f} ms, {100 * errors[-1]:.1f}% off"
        )
    GOALS.at_most("step time, median error", statistics.median(errors), 0.07, "%")
    GOALS.at_most("step time, worst error", max(errors), 0.15, "%")
    GOALS.note("  with the machine's drift left in: median, worst", f"{statistics.median(raw):.1%}, {max(raw):.1%}")
    # Far beyond what is wanted: a loaded machine must not fail this; the figures are what counts.
    assert statistics.median(errors) < 0.5


def test_predicted_peak_bytes() -> None:
    ids = torch.randint(0, 1024, (16, 128))
    ratios = []
    for settings in PLANS:
        with trainer_of(*settings, measure=False) as trainer:
            measured = measured_peaks(trainer, (ids, ids))
            predicted = dict(zip(trainer.plan.devices, trainer.plan.predicted.peak_bytes))
        own = [predicted[name] / peak - 1 for name, peak in measured.items()]
        ratios += own
        GOALS.note(f"peaks of {settings}", ", ".join(f"{ratio:+.1%}" for ratio in own))
    GOALS.at_most("peak bytes, most above what was counted", max(ratios), 0.05, "%")
    GOALS.at_least("peak bytes, most below", min(ratios), -0.02, "%")
    assert min(ratios) > -0.02


class Rated(nn.Module):
    """Takes a number of milliseconds forward and twice that backward, times the factor of the device it runs on."""

    factors: ClassVar[dict[str, float]] = {}

    def __init__(self, units: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.units = units

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = threading.current_thread().name
        factor = next((f for device, f in self.factors.items() if device in name), 1.0)
        time.sleep(1e-3 * self.units * factor)
        return _RatedBackward.apply(x * self.scale, 2e-3 * self.units * factor)


class _RatedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


def rated_trainer(work: list[int], **how: Any) -> ModelParallelTrainer:
    return ModelParallelTrainer(
        [Rated(units) for units in work], ["cpu:0", "cpu:1"], precision="fp32", microbatches=4,
        loss_fn=lambda out, y: out.mean(), loss_weight=len, recompute=False, **how,
    )  # fmt: skip


@pytest.mark.parametrize("slowed", [2, 4])
@pytest.mark.parametrize("slow", [0, 1])
def test_unequal_devices_against_brute_force(slow: int, slowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage slowed on purpose: steps as planned again after the second, beside steps of every possible split."""
    monkeypatch.setattr(Rated, "factors", {f"cpu:{slow}": float(slowed)})
    work = [1, *[3] * 6, 2]
    x, y = torch.randn(8, 3), torch.zeros(8, 3)
    with rated_trainer(work, measure=True, replan=True) as trainer:
        ours = [trainer.step(x, y).seconds for _ in range(4)][2:]
        plan = trainer.plan
    best = float("inf")
    for cut in range(1, len(work)):
        ends, names = [(0, cut), (cut, len(work))], [str(k) for k in range(len(work))]
        stages = tuple(
            dataclasses.replace(stage, layers=own, layer_names=tuple(names[slice(*own)]))
            for stage, own in zip(plan.stages, ends)
        )
        with rated_trainer(work, plan=dataclasses.replace(plan, stages=stages)) as trainer:
            best = min(best, *(trainer.step(x, y).seconds for _ in range(2)))
    GOALS.at_least(
        f"stage {slow} slowed {slowed}x: of the best of {len(work) - 1} splits that were run",
        best / min(ours),
        0.92,
        "%",
    )
    assert best / min(ours) > 0.8


def _costs_of(work: list[int]) -> Any:
    def costs_of(rows: int) -> tuple[list[LayerCost], LayerCost]:
        def layer(name: str, units: int) -> LayerCost:
            flops = units * 10**9 * rows
            return LayerCost(
                name=name,
                param_count=1000,
                trained_count=1000,
                own_bytes=1000,
                input_bytes=1000,
                output_bytes=1000,
                forward_flops=flops,
                backward_flops=2 * flops,
            )

        return [layer(f"l{k}", units) for k, units in enumerate(work)], layer("loss", 0)

    return costs_of


def test_planning_80_layers_on_8_devices() -> None:
    cards = [
        Device(f"cuda:{k}", torch.device("cuda"), (), 1, 10**12, (80 - 2 * k) * 10**9, "declared") for k in range(8)
    ]
    machine = make_machine(cards, {}, read_speeds("cuda=a100"), "fp16")
    begin = time.perf_counter()
    processor = time.process_time()
    settings = Settings(schedule="auto", microbatches="auto", transfer="none")
    plan = search_plan(_costs_of([1, *[6] * 78, 4]), machine, settings, batch=64)
    seconds, own = time.perf_counter() - begin, time.process_time() - processor
    GOALS.head("planning")
    GOALS.at_most(f"80 layers, 8 devices, {len(schedules.names())} schedules: processor time", own, 5.0, " s")
    GOALS.note("  on the clock", f"{seconds:.1f} s")
    assert len(plan.devices) == 8


def test_planning_a_20b_config() -> None:
    code = (
        "from spu.cli.app import main\n"
        "try: main('plan --model internlm2-20b --budget cuda:0=8GB,cpu=64GB --speed cpu=desktop-cpu'.split())\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "text = open('/proc/self/status').read()\n"  # since the start of this program, unlike ru_maxrss
        "print('bytes', 1024 * int(text.split('VmHWM:')[1].split()[0]))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert "does not fit" in done.stderr, done.stderr
    size = int(done.stdout.rsplit("bytes", 1)[1])
    GOALS.at_most("a 20B config from fake tensors: processor time", own, 20.0, " s")
    GOALS.note("  on the clock", f"{seconds:.1f} s")
    GOALS.at_most("  memory", size / 1e9, 2.0, " GB")
    assert size < 2e9
