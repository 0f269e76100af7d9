"""A model that is no longer the one that was prepared is refused by name, before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, mlp, trainer
from torch import nn

from spu import ModelParallelTrainer


def make(model: Any) -> ModelParallelTrainer:
    return trainer(model, precision="bf16", microbatches=2, lr=1e-4)


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(16, 6))


def add_parameter(model: nn.Sequential) -> None:
    model[0].register_parameter("more", nn.Parameter(torch.zeros(3)))


def delete_module(model: nn.Sequential) -> None:
    del model[1]  # makes a new table


def swap_modules(model: nn.Sequential) -> None:
    model[0], model[1] = model[1], model[0]  # the same members in another order


def rename_module(model: nn.Sequential) -> None:
    children = model._modules
    children["last"] = children.pop("2")


def replace_module(model: nn.Sequential) -> None:
    model[1] = nn.ReLU()


def append_module(model: nn.Sequential) -> None:
    model.append(nn.ReLU())


def parametrize(model: nn.Sequential) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[2])


def to_fp32(model: nn.Sequential) -> None:
    model.float()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replace_parameter, r"parameter '0.weight' was replaced"),
        (add_parameter, r"parameter '0.more' was added"),
        (replace_module, r"module '1' was replaced"),
        (delete_module, r"module '1' was replaced, added or removed"),
        (swap_modules, r"module '0' was replaced"),
        (rename_module, r"module '(2|last)' was replaced, added or removed"),
        (append_module, r"module '3' was replaced, added"),
        (parametrize, r"'2.parametrizations' was replaced, added|parameter '2.weight' was added or removed"),
        (to_fp32, r"parameter '0.weight' is torch.float32 .* was torch.bfloat16"),
    ],
)
def test_another_model_than_the_prepared_one_is_refused_by_name(
    edit: Callable[[nn.Sequential], None], message: str
) -> None:
    """The optimizer went on with the old parameter, and the new one was never trained."""
    model = mlp()
    with make(model) as trainer:
        trainer.step(*batch())
        edit(model)
        for call in (lambda: trainer.step(*batch()), lambda: trainer.evaluate(*batch()), trainer.state_dict_for_model):
            with pytest.raises(RuntimeError, match=message):
                call()


def test_a_list_of_layers_that_has_changed_is_refused() -> None:
    layers = list(mlp())
    with make(layers) as trainer:
        trainer.step(*batch())
        layers[1] = nn.ReLU()
        with pytest.raises(RuntimeError, match="the list of layers has changed"):
            trainer.step(*batch())


def test_a_model_that_is_converted_and_back_goes_on() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with make(model) as trainer:
        trainer.step(*batch())
        exact = trainer.state_dict_for_model()
        model.float()
        model.bfloat16()
        assert model[2].weight is model[0].weight
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, exact[name], name)
        trainer.step(*batch())


def test_a_hook_on_the_whole_model_is_refused() -> None:
    """A pipeline calls the layers: it was left out without a word."""
    model = mlp()
    with make(model) as trainer:
        trainer.step(*batch())
        hook = model.register_forward_hook(lambda module, inputs, output: output * 2)
        with pytest.raises(RuntimeError, match=r"the model \(Sequential\) has a hook"):
            trainer.step(*batch())
        hook.remove()
        trainer.step(*batch())


def test_what_changes_after_a_parameter_was_frozen_is_found_too() -> None:
    """Freezing is allowed, and makes every later look a long one."""
    model = mlp()
    with make(model) as trainer:
        trainer.step(*batch())
        model[2].bias.requires_grad_(False)
        trainer.step(*batch())
        replace_parameter(model)
        with pytest.raises(RuntimeError, match=r"parameter '0.weight' was replaced"):
            trainer.step(*batch())
