"""Where what an optimizer keeps goes with its parameters. Meta tensors stand for a card's."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from spu.engine.optimizer_state import OptimizerState, restore_optimizers
from spu.optim.master import MasterOptimizer

HOST, CARD = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("saved", "to", "settings", "lies"),
    [
        (HOST, CARD, {"fused": True}, CARD),  # a checkpoint's, loaded for a card
        (HOST, CARD, {"capturable": True}, CARD),
        (HOST, CARD, {}, HOST),
        (CARD, HOST, {"fused": True}, HOST),  # layers that move
        (CARD, HOST, {}, HOST),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_step_count_lies_where_the_optimizer_reads_it(
    dtype: torch.dtype, saved: torch.device, to: torch.device, settings: dict[str, Any], lies: torch.device
) -> None:
    """A kernel of torch's fused AdamW read the count of a run that was resumed at the host's address."""
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype, device=to))
    optimizer = MasterOptimizer(lambda tensors: torch.optim.AdamW(tensors, **settings), [parameter])
    entries = {"p/step": torch.zeros((), device=saved), "p/exp_avg": torch.zeros(3, device=saved)}
    built = cast(Any, SimpleNamespace(owned=[{"p": parameter}]))
    if saved == CARD and to == HOST:  # a meta tensor has no values to bring
        entries["p/step"] = cast(Any, OnCard(()))
        entries["p/exp_avg"] = cast(Any, OnCard((3,)))
    restore_optimizers(built, [optimizer], OptimizerState("AdamW", cast(Any, entries), [[{}]], [1]))
    state = optimizer.optimizer.state[optimizer.target(parameter)]
    assert (state["step"].device, state["exp_avg"].device) == (lies, to)


MADE = {
    "ASGD": (torch.optim.ASGD, {}), "NAdam": (torch.optim.NAdam, {}), "RAdam": (torch.optim.RAdam, {}),
    "NAdam, capturable": (torch.optim.NAdam, {"capturable": True}), "Adagrad": (torch.optim.Adagrad, {}),
    "Rprop": (torch.optim.Rprop, {}), "Adadelta": (torch.optim.Adadelta, {}), "Adamax": (torch.optim.Adamax, {}),
    "Adafactor": (torch.optim.Adafactor, {}), "AdamW": (torch.optim.AdamW, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_is_loaded_lies_where_torch_makes_it(name: str) -> None:
    """ASGD's `eta` and `mu` stayed on the host."""
    make, settings = MADE[name]
    own = nn.Parameter(torch.zeros(3, 2, device=CARD))
    made, own.grad = make([own], **settings), torch.zeros_like(own)
    with contextlib.suppress(Exception):  # a meta tensor has no values; the state is there by then
        made.step()
    parameter = nn.Parameter(torch.zeros(3, 2, device=CARD))
    optimizer = MasterOptimizer(lambda tensors: make(tensors, **settings), [parameter])
    entries = {f"p/{key}": torch.zeros(value.shape) for key, value in made.state[own].items()}
    assert entries
    built = cast(Any, SimpleNamespace(owned=[{"p": parameter}]))
    state = OptimizerState(make.__name__, cast(Any, entries), [[{}]], [1])
    restore_optimizers(built, [optimizer], state)
    loaded = optimizer.optimizer.state[optimizer.target(parameter)]
    assert {key: value.device for key, value in loaded.items()} == {
        key: value.device for key, value in made.state[own].items()
    }


class OnCard(torch.Tensor):
    """A tensor of the host that says it is a card's."""

    @staticmethod
    def __new__(cls: Any, shape: tuple[int, ...]) -> Any:
        return torch.Tensor._make_subclass(cls, torch.zeros(shape))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    def to(self, device: Any, copy: bool = False) -> Any:
        return torch.zeros(self.shape, device=device)
