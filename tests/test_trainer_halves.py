"""A step in two halves: what is done between them does not change the training, nor what is read after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import batch, layers, trainer
from torch import nn

from spu import ModelParallelTrainer
from spu.trainer.halves import begin_step, end_step

BETWEEN: dict[str, Callable[[ModelParallelTrainer, Path], object]] = {
    "flush": lambda made, _: made.flush(),
    "state": lambda made, _: made.state_dict_for_model(),
    "save": lambda made, folder: made.save(folder / "between"),
    "evaluate": lambda made, _: made.evaluate(*batch(seed=9)),
}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("residency", ["resident", "offloaded", "streamed"])
def test_what_is_read_between_the_halves_hides_no_update(residency: str, between: str, tmp_path: Path) -> None:
    """Streamed and offloaded weights were those of the step before, also in a checkpoint, and after close()."""
    plain, model = nn.Sequential(*layers()), nn.Sequential(*layers())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    settings = {} if residency == "resident" else {"tiers": f"disk={tmp_path / 'disk'}:1GB", "residency": residency}
    (tmp_path / "disk").mkdir()
    with trainer(model, 1, microbatches=2, lr=0.02, **settings) as made:
        for seed in range(3):
            x, y = batch(seed=seed)
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(2), y.chunk(2)):
                (F.cross_entropy(plain(part_x), part_y) / 2).backward()
            optimizer.step()
            halfway = begin_step(made, x, y)
            if seed != 1:
                BETWEEN[between](made, tmp_path)
            end_step(made, halfway)
            if seed:  # with and without a look before the next step
                for key, value in made.state_dict_for_model().items():
                    assert_equal(value, plain.state_dict()[key], f"{key} after step {seed}")
        halfway = begin_step(made, *batch(seed=7))
        BETWEEN[between](made, tmp_path)
        end_step(made, halfway)
    optimizer.zero_grad()
    x, y = batch(seed=7)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2)):
        (F.cross_entropy(plain(part_x), part_y) / 2).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert_equal(value, plain.state_dict()[key], f"{key} after close()")
