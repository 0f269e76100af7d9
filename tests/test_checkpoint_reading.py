"""A checkpoint read tensor by tensor: the same values, verified before, and no second copy in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_step
from torch import nn

from spu import ModelParallelTrainer
from spu.checkpoint import writing as checkpoint
from spu.checkpoint.writing import CheckpointError, Stored, load, opened, save


def test_tensors_read_one_by_one_are_those_that_were_saved(path: Path) -> None:
    tensors = {
        "wide": torch.randn(5, 7, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
    }
    save(path, tensors=tensors, meta={"step": 3})
    with opened(path) as (stored, meta):
        assert meta == {"step": 3}
        assert list(stored) == list(load(path)[0])
        for name in reversed(list(tensors)):
            entry = stored[name]
            assert isinstance(entry, Stored)
            assert (entry.shape, entry.dtype) == (tensors[name].shape, tensors[name].dtype)
            assert torch.equal(entry.read(), tensors[name])
            assert torch.equal(entry.read(), tensors[name]), "a second time too"


def test_damage_is_found_before_anything_is_read(path: Path) -> None:
    save(path, tensors={"w": torch.ones(100)}, meta={})
    with open(path / "tensors.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="is damaged: its checksum does not match"), opened(path):
        pytest.fail("it was opened")
    with pytest.raises(CheckpointError, match="no checkpoint at"), opened(path.with_name("nothing")):
        pytest.fail("it was opened")


def test_what_a_crash_left_beside_its_place_is_there_and_is_opened(path: Path) -> None:
    assert not checkpoint.exists(path)
    save_step(path, 1)
    assert checkpoint.exists(path)
    new, old = checkpoint._leftovers(path)
    os.replace(path, old)
    assert checkpoint.exists(path)
    save_step(path.with_name("other"), 2)
    os.replace(path.with_name("other"), new)
    with opened(path) as (_, meta):
        assert meta["step"] == 2
    (new / "manifest.json").unlink()
    with opened(path) as (_, meta):
        assert meta["step"] == 1
    (old / "manifest.json").unlink()
    assert not checkpoint.exists(path)


PEAK = """
import resource, sys
from test_checkpoint_reading import large
trainer, batch = large()
trainer.prepare(*batch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.load(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def large() -> tuple[ModelParallelTrainer, tuple[torch.Tensor, torch.Tensor]]:
    """A trainer of 17 million parameters, and a batch."""
    layers = [nn.Linear(2048, 2048) for _ in range(4)]
    trainer = ModelParallelTrainer(layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, lr=1e-3)
    return trainer, (torch.randn(4, 2048), torch.zeros(4, dtype=torch.long))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_loading_takes_the_moments_and_a_tensor_at_a_time(path: Path) -> None:
    """It held the whole checkpoint, 12 bytes a parameter, beside what training holds."""
    trainer, batch = large()
    with trainer:
        trainer.step(*batch)
        trainer.save(path)
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    parameters = 4 * 2048 * 2049
    assert int(done.stdout) < 8 * parameters + 4 * parameters // 2, f"{int(done.stdout) / parameters:.1f} B a parameter"
