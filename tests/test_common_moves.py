"""Parameters keep their identity on the way to another device, whatever torch.__future__ has been told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, mlp
from torch import Tensor

from spu import ModelParallelTrainer
from spu.common.moves import move_module

OPTIONS = [
    torch.__future__.set_overwrite_module_params_on_conversion,
    torch.__future__.set_swap_module_params_on_conversion,
]


@pytest.fixture(params=OPTIONS, ids=["overwrite", "swap"])
def option(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    yield request.param
    request.param(False)


def test_parameters_are_the_same_objects(option: Callable[[bool], None]) -> None:
    option(True)
    layers = mlp()
    before = list(layers.parameters())
    known = [weakref.ref(parameter) for parameter in before]  # which torch's swap refuses
    move_module(layers, torch.device("cpu"))
    assert [a is b for a, b in zip(before, layers.parameters(), strict=True)] == [True] * len(before)
    assert all(ref() is not None for ref in known)
    assert torch.__future__.get_overwrite_module_params_on_conversion() is (option is OPTIONS[0])
    assert torch.__future__.get_swap_module_params_on_conversion() is (option is OPTIONS[1])


def test_a_trainer_finds_its_masters(option: Callable[[bool], None]) -> None:
    """Exact values are known by parameter: others were looked for, and rounded ones or another one's were taken."""

    def trained(on: bool) -> dict[str, Tensor]:
        layers = mlp()
        option(on)
        with ModelParallelTrainer(
            layers, devices=["cpu:0", "cpu:1"], precision="bf16", lr=1e-5, microbatches=2
        ) as trainer:  # fmt: skip
            for _ in range(2):
                trainer.step(*batch())
            return trainer.state_dict_for_model()

    plain, found = trained(False), trained(True)
    for name, value in plain.items():
        assert_equal(found[name], value, name)
