"""Activations that wait on a disk, as they are and packed, beside a run that keeps them: seconds, bytes, gradients.

Half of the decoder of ``pipeline_model.py`` in fp32 on one core, a stage a layer, all recomputed. The runs take turns,
and ratios are medians over the rounds, of CPU seconds: they have the copies and the store's threads, and not what else
runs on the machine. The folder is pytest's temporary one: `--basetemp DIR` for another disk.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pipeline_model as lm
import torch
from goals import GOALS

from spu import DeviceManager, ModelParallelTrainer
from spu.common.codecs import parked_bytes
from spu.engine.counted import counted_bytes
from spu.memory.activations import ActivationStore
from spu.memory.disk_store import DiskStore
from spu.memory.unit import allocated

ROUNDS = 5
BLOCKS, LENGTH = lm.LAYERS // 2, lm.LENGTH // 2
BOUNDARY_BYTES = lm.ROWS // lm.MICROBATCHES * LENGTH * lm.WIDTH * 4


class Run:
    """A trainer with its activations where ``mode`` says; "keep": on the device."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.mode = mode
        (device,) = DeviceManager().get_devices(["cpu:0"])
        layers = lm.make_layers()
        del layers[1 : 1 + lm.LAYERS - BLOCKS]
        self.trainer = ModelParallelTrainer(
            layers, [device], loss_fn=lm.loss_fn, precision="fp32", lr=1e-4, microbatches=lm.MICROBATCHES,
            schedule="layer_outer", virtual=len(layers), recompute=True,
        )  # fmt: skip
        self.batch = tuple(part[:, :LENGTH].contiguous() for part in lm.make_batch())
        self.trainer.prepare(*self.batch)
        assert self.trainer._runner is not None
        self.runner = self.trainer._runner
        self.store = DiskStore(folder)
        self.activations: ActivationStore | None = None
        if mode != "keep":
            codec = None if mode == "exact" else mode
            each = parked_bytes(BOUNDARY_BYTES // 4, 4, codec)
            sizes = [each] * (len(layers) - 2) * lm.MICROBATCHES
            _, regions = allocated({}, self.store, sizes)
            self.activations = ActivationStore(self.store, regions, torch.device("cpu"), codec=codec)
            for stage in self.runner.built.stages:
                stage.activations = self.activations

    def step(self) -> tuple[float, float]:
        """CPU seconds of all threads, and seconds."""
        begin, start = time.process_time(), time.perf_counter()
        self.trainer.step(*self.batch)
        return time.process_time() - begin, time.perf_counter() - start

    def peak_bytes(self) -> int:
        """The most bytes of a step's tensors, and the slots."""
        with counted_bytes(self.runner) as peaks:
            self.trainer.step(*self.batch)
        (peak,) = peaks.values()
        return peak + (0 if self.activations is None else self.activations.slot_bytes)

    def gradients(self) -> torch.Tensor:
        self.trainer.forward_backward(*self.batch)
        return torch.cat([p.grad.flatten() for s in self.runner.built.stages for p in s.parameters()])


@contextlib.contextmanager
def runs(folder: Path) -> Iterator[list[Run]]:
    made: list[Run] = []
    try:
        for mode in ("keep", "exact", "int8"):
            made.append(Run(mode, folder))
        yield made
    finally:
        for run in made:
            run.trainer.close()
            run.store.close()


def test_activations_on_a_disk(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with runs(tmp_path) as (keep, exact, int8):
        grads = [run.gradients() for run in (keep, exact, int8)]
        assert torch.equal(grads[1], grads[0])
        peaks = [run.peak_bytes() for run in (keep, exact, int8)]
        seconds = [[run.step() for run in (keep, exact, int8)] for _ in range(ROUNDS)]
    GOALS.head(f"activations on a disk, {BLOCKS} blocks of {lm.WIDTH}, {lm.MICROBATCHES} microbatches, fp32, 1 core")
    for index, run in enumerate((keep, exact, int8)):
        cpu, wall = (statistics.median(row[index][which] for row in seconds) for which in (0, 1))
        GOALS.note(
            f"{run.mode}: a step's CPU seconds, seconds, peak of bytes",
            f"{cpu:.2f} {wall:.2f} {peaks[index] / 1e6:.0f} MB",
        )
        if run.activations is not None:
            assert run.activations.counts.kept == 0
            ratio = statistics.median(row[0][0] / row[index][0] for row in seconds)
            GOALS.at_least(f"{run.mode}: speed in CPU seconds", ratio, 0.95, "x keep")
    assert int8.activations is not None
    GOALS.at_most("int8: bytes", int8.activations.counts.stored / int8.activations.counts.parked, 0.45, "%")
    GOALS.note("int8: error of the gradient", f"{float((grads[2] - grads[0]).norm() / grads[0].norm()):.1e}")
