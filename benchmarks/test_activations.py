"""Activations that wait on a disk, as they are and packed, beside a run that keeps them: seconds, bytes, gradients.

Half of the decoder of ``pipeline_model.py`` in fp32 on one core, a stage a layer, all recomputed. The runs take turns,
and ratios are medians over the rounds. The folder is pytest's temporary one: `--basetemp DIR` for another disk.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path

import pipeline_model as lm
import torch
from conftest import seconds_of
from goals import GOALS

from spu import DeviceManager, ModelParallelTrainer
from spu.common.codecs import parked_bytes
from spu.engine.result import counted_bytes
from spu.memory.activations import ActivationStore
from spu.memory.disk_store import DiskStore

ROUNDS = 3
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
            self.activations = ActivationStore.on(self.store, sizes, torch.device("cpu"), codec=codec)
            for stage in self.runner.built.stages:
                stage.activations = self.activations

    def step(self) -> float:
        return seconds_of(lambda: self.trainer.step(*self.batch))

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
    GOALS.note(
        "keep: a step, and its peak of bytes",
        f"{statistics.median(s[0] for s in seconds):.2f} s {peaks[0] / 1e6:.1f} MB",
    )
    for index, run in ((1, exact), (2, int8)):
        assert run.activations is not None
        counts = run.activations.counts
        assert counts.kept == 0
        GOALS.note(
            f"{run.mode}: peak of bytes, with {run.activations.slot_bytes / 1e6:.1f} MB of slots",
            f"{peaks[index] / 1e6:.1f} MB",
        )
        GOALS.at_least(f"{run.mode}: speed", statistics.median(s[0] / s[index] for s in seconds), 0.95, "x keep")
    GOALS.at_most("int8: bytes", int8.activations.counts.stored / int8.activations.counts.parked, 0.45, "%")
    GOALS.note("int8: error of the gradient", f"{float((grads[2] - grads[0]).norm() / grads[0].norm()):.1e}")
