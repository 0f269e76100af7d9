"""Checkpoints of stages in several processes: the same files as of one, and resumed by any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pipelines import devices
from ranks import in_ranks
from safetensors.torch import load_file
from torch import nn

from spu import ModelParallelTrainer
from spu.ops import use_backend


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    )


def go_on(engine: str, places: Any, folder: str, before: str, after: str, precision: str) -> Any:
    """Two steps from a checkpoint, and one more; losses, and the trained model's state."""
    draws = torch.Generator().manual_seed(int(after))
    with (
        use_backend("reference"),
        ModelParallelTrainer(model(), places, engine=engine, precision=precision, lr=1e-2, microbatches=4) as trainer,
    ):
        x, y = torch.randn(12, 6, generator=draws), torch.randint(3, (12,), generator=draws)
        trainer.prepare(x, y)
        if before:
            assert trainer.load(Path(folder) / before) == {"mine": before}
        losses = [trainer.step(x, y).loss for _ in range(2)]
        trainer.save(Path(folder) / after, {"mine": after})
        state = trainer.state_dict_for_model()
        return losses, {name: tensor.tolist() for name, tensor in state.items()}


def test_any_number_of_processes_goes_on_from_any_other(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "local").mkdir()
    (tmp_path / "ranks").mkdir()
    wanted, found = [], []
    try:
        for index, count in enumerate((1, 3, 2)):
            before, after = str(index) if index else "", str(index + 1)
            precision = "fp16"
            wanted.append(go_on("local", devices(count), str(tmp_path / "local"), before, after, precision))
            if count == 1:
                own = go_on("local", devices(1), str(tmp_path / "ranks"), before, after, precision)
            else:
                own, *others = in_ranks(
                    count, go_on, "distributed", "auto", str(tmp_path / "ranks"), before, after, precision
                )
                assert all(losses == own[0] for losses, _ in others)
                assert all(state == {} for _, state in others)
            found.append(own)
    finally:
        torch.set_num_threads(threads)
    assert found == wanted
    assert wanted[0][0] != wanted[1][0]
    for one in (tmp_path / "local").iterdir():
        same = tmp_path / "ranks" / one.name / "tensors.safetensors"

        mine, theirs = load_file(same), load_file(one / "tensors.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
