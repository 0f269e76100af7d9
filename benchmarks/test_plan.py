"""Plans beside what they promise: seconds of a step, peak bytes, splits over unequal devices, the time of planning.

Rules: layers are timed just before the steps that they predict; a step is the median of five after two; peak bytes are
counted storage by storage, on the CPU; brute force tries every split. Run it on an idle machine: what other processes
take falls on the measured side alone.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from memory_probe import measured_peaks

from spu import schedules
from spu.devices import Device
from spu.job.model import quiet_transformers
from spu.plan.machine import make_machine, read_speeds
from spu.plan.search import Wanted, search_plan
from spu.profile import LayerCost
from spu.trainer import ModelParallelTrainer

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


def trainer_of(precision: str, schedule: str, microbatches: int, recompute: bool, layers: int) -> ModelParallelTrainer:
    return ModelParallelTrainer(
        decoder(layers),
        ["cpu:0", "cpu:1"],
        precision=precision,
        schedule=schedule,
        microbatches=microbatches,
        recompute=recompute,
        measure=True,
    )


def test_predicted_step_time() -> None:
    ids = torch.randint(0, 1024, (16, 128))
    errors = []
    for settings in PLANS:
        with trainer_of(*settings) as trainer:
            trainer.prepare(ids, ids)
            times = []
            for step in range(7):
                begin = time.perf_counter()
                trainer.step(ids, ids)
                if step > 1:
                    times.append(time.perf_counter() - begin)
            measured, predicted = statistics.median(times), trainer.plan.predicted.step_s
        errors.append(abs(predicted / measured - 1))
        print(f"{settings}: predicted {1e3 * predicted:.1f} ms, measured {1e3 * measured:.1f} ms, {errors[-1]:.1%}")
    print(f"step time over {len(PLANS)} plans: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    # Far beyond what is wanted (7%, at worst 15%): a loaded machine must not fail this; the figures are what counts.
    assert statistics.median(errors) < 0.5


def test_predicted_peak_bytes() -> None:
    ids = torch.randint(0, 1024, (16, 128))
    ratios = []
    for settings in PLANS:
        with trainer_of(*settings) as trainer:
            measured = measured_peaks(trainer, (ids, ids))
            predicted = dict(zip(trainer.plan.devices, trainer.plan.predicted.peak_bytes))
        own = [predicted[name] / peak - 1 for name, peak in measured.items()]
        ratios += own
        print(f"{settings}: predicted beside measured peak " + ", ".join(f"{ratio:+.1%}" for ratio in own))
    print(f"peak bytes: {min(ratios):+.1%} to {max(ratios):+.1%}")
    assert min(ratios) > -0.02


def test_unequal_devices_against_brute_force() -> None:
    """One stage slowed 2x and 4x: the pipeline of the planned split against that of the best of all splits."""
    work = [1, *[3] * 12, 2]
    for slowed in (2, 4):
        for slow in (0, 1):
            rates = [1.0 / slowed if k == slow else 1.0 for k in range(2)]
            devices = [Device(f"cpu:{k}", torch.device("cpu"), (), 1, 10**12, 10**11, "made up") for k in range(2)]
            speeds = read_speeds(",".join(f"cpu:{k}={rate}GFLOPS" for k, rate in enumerate(rates)))
            machine = make_machine(devices, {}, speeds, "fp32", update_rates={d.name: 1e30 for d in devices})
            wanted = Wanted(batch=8, microbatches=8, schedule="1f1b", precision="fp32", same_order=True)
            plan = search_plan(_costs_of(work), machine, wanted)
            best = min(
                schedules.simulate(
                    schedules.get("1f1b")(2, 8), [(sum(work[a:b]) / r, 2 * sum(work[a:b]) / r) for a, b, r in ends]
                ).makespan
                for cut in range(1, len(work))
                for ends in [[(0, cut, rates[0]), (cut, len(work), rates[1])]]
            )
            share = best / plan.timeline().makespan
            print(f"stage {slow} slowed {slowed}x: {share:.1%} of the best of {len(work) - 1} splits")
            assert share >= 0.92


def _costs_of(work: list[int]) -> Any:
    def costs_of(rows: int) -> tuple[list[LayerCost], LayerCost]:
        def layer(name: str, units: int) -> LayerCost:
            flops = units * 10**9 * rows
            return LayerCost(name, flops, 4000, 1000, 1000, 1000, own_bytes=1000, backward_flops=2 * flops)

        return [layer(f"l{k}", units) for k, units in enumerate(work)], layer("loss", 0)

    return costs_of


def test_planning_80_layers_on_8_devices() -> None:
    cards = [
        Device(f"cuda:{k}", torch.device("cuda"), (), 1, 10**12, (80 - 2 * k) * 10**9, "declared") for k in range(8)
    ]
    machine = make_machine(cards, {}, read_speeds("cuda=a100"), "fp16")
    begin = time.perf_counter()
    processor = time.process_time()
    plan = search_plan(_costs_of([1, *[6] * 78, 4]), machine, Wanted(batch=64))
    seconds, own = time.perf_counter() - begin, time.process_time() - processor
    print(f"80 layers, 8 devices, {len(schedules.names())} schedules: {seconds:.1f} s ({own:.1f} s of processor)")
    assert len(plan.devices) == 8


def test_planning_a_20b_config() -> None:
    code = (
        "import resource, sys; from spu.cli import main\n"
        "try: main('plan --model internlm2-20b --budget cuda:0=8GB,cpu=64GB --speed cpu=desktop-cpu'.split())\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print('bytes', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert "does not fit" in done.stderr, done.stderr
    size = int(done.stdout.rsplit("bytes", 1)[1])
    print(f"20B config: {seconds:.1f} s ({own:.1f} s of processor), {size / 1e9:.2f} GB")
    assert size < 2e9
