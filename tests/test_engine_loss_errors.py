"""A loss that fails says what it was given, and keeps the class of its error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spu
from spu.engine.engine import StageError
from spu.engine.loss_errors import explained


def failure(targets: torch.Tensor, loss: object = None) -> StageError:
    model = nn.Sequential(nn.Linear(3, 5))
    with (
        spu.ModelParallelTrainer(
            model,
            ["cpu:0"],
            precision="fp32",
            microbatches=2,
            loss_fn=loss,  # type: ignore[arg-type]
        ) as trainer,
        pytest.raises(StageError) as caught,
    ):
        trainer.step(torch.randn(4, 3), targets)
    return caught.value


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()], ids=["default", "torch"])
def test_targets_of_another_type_or_shape_are_named(loss: object) -> None:
    wrong = failure(torch.tensor([0, 1, 2, 3], dtype=torch.int32), loss)
    assert "outputs float32 [2, 5] and targets int32 [2]: class indices are int64, give targets.long()" in str(wrong)
    assert isinstance(wrong.__cause__, RuntimeError)
    beyond = failure(torch.tensor([0, 1, 2, 7]), loss)
    assert "Target 7 is out of bounds" in str(beyond)
    assert "outputs float32 [2, 5] and targets int64 [2], which go from 2 to 7" in str(beyond)
    assert isinstance(beyond.__cause__, IndexError)
    assert "outputs float32 [2, 5] and targets int64 [1]" in str(failure(torch.zeros(3, dtype=torch.long), loss))


class Own(ValueError):
    def __init__(self, code: int) -> None:
        super().__init__(code)


@pytest.mark.parametrize(
    "error", [Own(3), KeyError("x"), RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()], ids=repr
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert explained(error, torch.ones(2), torch.ones(2)) is error
    assert explained(ValueError("wrong"), torch.ones(2), [1, 2]).args == ("wrong",)


def test_what_the_user_raises_is_kept_as_the_cause() -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.max() > 3:
            raise ValueError("no such class")
        return F.cross_entropy(outputs, targets)

    assert "ValueError: no such class (of a microbatch" in str(failure(torch.tensor([0, 1, 2, 4]), loss))
