"""What one process has been given otherwise is refused by name: training on, replicas would drift apart unseen."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import in_ranks
from torch import nn

from spu import LossScaler, ModelParallelTrainer
from spu.distributed.consistency import described, given_facts

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.2)},
    "loss function": {"loss_fn": nn.CrossEntropyLoss(reduction="sum")},
    "loss scale": {"scaler": LossScaler(init_scale=1024.0)},
    "first batch": {},
}


def refused() -> dict[str, str]:
    """Returns what each change in rank 1 is told."""
    said = {}
    for name, change in CHANGES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        settings: dict[str, Any] = {
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "loss_fn": nn.CrossEntropyLoss(),
            "scaler": LossScaler(init_scale=65536.0),
        }
        rank = int(os.environ["RANK"])
        settings |= change if rank else {}
        x, y = torch.ones(4, 4), torch.arange(4) % 3
        if name == "first batch" and rank:
            y = y.flip(0)
        with ModelParallelTrainer(
            model, "cpu", engine="distributed", microbatches=2, precision="fp16", **settings
        ) as t:
            try:
                said[name] = str(t.step(x, y).loss > 0)
            except ValueError as error:
                said[name] = str(error)
    return said


def test_what_only_one_process_was_given_is_named_in_all() -> None:
    for said in in_ranks(2, refused):
        assert said.pop("nothing") == "True"
        assert len(said) == 4
        for name, text in said.items():
            assert text.startswith(f"rank 1 has another {name} than rank 0: every process must have the same one"), said


class Own:
    """A loss of the user's that knows its rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets)


def test_what_a_process_has_for_itself_is_not_compared() -> None:
    assert described(Own(0)) == described(Own(1))
    assert described(lambda x: x) == described(lambda x: x)
    assert described(partial(Own, torch.ones(1))) == described(partial(Own, torch.zeros(1)))
    assert described(partial(Own, 1)) != described(partial(Own, 2))
    assert described(nn.CrossEntropyLoss(label_smoothing=0.1)) != described(nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "batch", [None, ({"ids": torch.ones(2, 3, dtype=torch.bfloat16)}, 4), (torch.empty(0, 3), "a")]
)
def test_batches_of_any_form_have_a_fact(batch: Any) -> None:
    facts = given_facts(batch, None, None, {})
    assert facts == given_facts(batch, None, None, {})
    assert facts["first batch"] != given_facts((batch, 1), None, None, {})["first batch"]


def went_apart() -> dict[str, str]:
    """Returns what is said where rank 1 has another second batch, evaluation, factor or rate, and that all goes on."""
    rank, said = int(os.environ["RANK"]), {}

    def schedule(step: int) -> float:
        return 0.5 if said.get("factor") == "now" and rank else 1.0

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    x, y = torch.randn(4, 4), torch.arange(4) % 3
    settings: dict[str, Any] = {"loss_fn": nn.CrossEntropyLoss(), "microbatches": 2, "precision": "fp32"}
    settings |= {"lr_schedule": schedule, "replicas": 2, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    with ModelParallelTrainer(model, "cpu", engine="distributed", **settings) as t:

        def told(name: str, work: Any) -> None:
            before = {key: value.clone() for key, value in model.state_dict().items()}
            said[name] = "now"
            try:
                work()
                said[name] = "trained on"
            except ValueError as error:
                same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
                said[name] = f"{error} unchanged={same}"

        other = x.flip(0) if rank else x
        t.step(x, y)
        told("batch", lambda: t.step(other, y))
        told("evaluation", lambda: t.evaluate(x, y.flip(0) if rank else y))
        told("factor", lambda: t.step(x, y))
        group = t._prepared().updater.optimizers[0].param_groups[0]  # as a torch scheduler has it
        group["lr"] = 0.3 if rank else 0.1
        told("rate", lambda: t.step(x, y))
        group["lr"] = 0.1
        told("nothing", lambda: t.step(x, y))
        said["steps"] = str(t.steps_done)
        said["weights"] = str(sum(value.double().sum().item() for value in model.state_dict().values()))
    return said


def test_what_a_process_has_otherwise_later_is_named_before_the_update() -> None:
    """Only the first batch was compared: replicas of another order of rows, or another rate, trained apart unseen."""
    first, second = in_ranks(2, went_apart)
    assert first == second
    assert first["nothing"] == "trained on"
    assert first["steps"] == "2"
    for name, text in (
        ("batch", "rank 1 has another batch than rank 0 in this step; nothing was updated"),
        ("evaluation", "rank 1 has another batch than rank 0"),
        ("factor", "rank 1 has another learning rate from lr_schedule than rank 0 in this step: 0.5, not 1"),
        ("rate", "rank 1 has another setting of an optimizer (lr, betas, ...) than rank 0"),
    ):
        assert first[name].startswith(text), first[name]
        assert first[name].endswith("unchanged=True"), first[name]
