"""Checkpoints of stages in several processes: the same files as of one, and resumed by any number of processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelines import devices
from ranks import in_ranks
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
        nn.BatchNorm1d(8),  # in a later stage: nothing runs before the first step that it would count
        nn.Linear(8, 3),
    )


def go_on(engine: str, places: Any, folder: str, before: str, after: str, state: str) -> Any:
    """Two steps from a checkpoint, and one more; losses, and the trained model's state."""
    draws = torch.Generator().manual_seed(int(after))
    with (
        use_backend("reference"),
        ModelParallelTrainer(model(), places, engine=engine, state=state, lr=1e-2, microbatches=4) as trainer,
    ):
        x, y = torch.randn(12, 6, generator=draws), torch.randint(3, (12,), generator=draws)
        trainer.prepare(x, y)
        if before:
            assert trainer.load(Path(folder) / before) == {"mine": before}
        losses = [trainer.step(x, y).loss for _ in range(2)]
        trainer.save(Path(folder) / after, {"mine": after})
        if engine == "distributed":
            check_own_alone(trainer)
        whole = trainer.state_dict_for_model()
        assert not whole or whole["6.num_batches_tracked"] == 8 * int(after)  # of 4 microbatches, twice
        return losses, {name: tensor.tolist() for name, tensor in whole.items()}


def check_own_alone(trainer: ModelParallelTrainer) -> None:
    """The parameters of other processes' stages take the memory of one element, and are refused as values."""
    net, plan = trainer._parts.as_module(), trainer.plan
    assert plan is not None
    for place, stage in enumerate(plan.stages):
        for layer in net[stage.layers[0] : stage.layers[1]]:
            sizes = [(p.untyped_storage().nbytes(), p.element_size()) for p in layer.parameters()]
            if place == dist.get_rank():
                assert all(size > one for size, one in sizes)
                layer.state_dict()
            elif sizes:
                assert all(size == one for size, one in sizes)
                for touch in (layer.state_dict, partial(layer, torch.ones(2, 8))):
                    with pytest.raises(RuntimeError, match="weight .*in a stage of another process"):
                        touch()
    with pytest.raises(RuntimeError, match=r"take trainer\.state_dict_for_model\(\), called in every process"):
        net.state_dict()


@pytest.mark.usefixtures("one_thread")
def test_any_number_of_processes_goes_on_from_any_other(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "ranks").mkdir()
    wanted, found = [], []
    for index, count in enumerate((1, 3, 2)):
        before, after = str(index) if index else "", str(index + 1)
        state = "exact" if count == 2 else "fp32"
        wanted.append(go_on("local", devices(count), str(tmp_path / "local"), before, after, state))
        if count == 1:
            own = go_on("local", devices(1), str(tmp_path / "ranks"), before, after, state)
        else:
            own, *others = in_ranks(count, go_on, "distributed", "auto", str(tmp_path / "ranks"), before, after, state)
            assert all(losses == own[0] for losses, _ in others)
            assert all(state == {} for _, state in others)
        found.append(own)
    assert found == wanted
    assert wanted[0][0] != wanted[1][0]
    for one in (tmp_path / "local").iterdir():
        same = tmp_path / "ranks" / one.name / "tensors.safetensors"
        assert same.read_bytes() == (one / "tensors.safetensors").read_bytes()


def fails(folder: str) -> list[str]:
    """A save whose folder is a file, and one that succeeds after it."""
    texts = []
    with ModelParallelTrainer(model(), engine="distributed", precision="fp32", microbatches=4) as trainer:
        trainer.prepare(torch.zeros(12, 6), torch.zeros(12, dtype=torch.int64))
        for name in ("file", "good"):
            try:
                trainer.save(Path(folder) / name)
                texts.append("done")
            except ValueError as error:
                texts.append(str(error))
    return texts


def test_a_save_that_fails_is_told_in_every_process_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    leads, follows = in_ranks(2, fails, str(tmp_path))
    assert leads[1] == follows[1] == "done"
    assert "is not a spu checkpoint; it was left as it is" in leads[0]
    assert follows[0].startswith("rank 0 could not save: CheckpointError")
    assert (tmp_path / "file").read_text() == "mine"
