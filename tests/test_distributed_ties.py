"""A parameter that stages of several processes use trains as in one process: losses, norms, skips and checkpoints."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipelines import devices
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.ops import use_backend


class TiedLoss(nn.Module):
    """A loss whose product with the embedding's weight is its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            (hidden.to(self.weight.dtype) @ self.weight.t()).float().flatten(0, -2), targets.flatten()
        )


def tied_weight(trainer: ModelParallelTrainer) -> torch.Tensor:
    weight: torch.Tensor = trainer._parts.layers[0].module.weight
    return weight


def model(uses: int = 2) -> nn.Sequential:
    """An embedding whose weight is the head's too, and with four uses that of two layers between."""
    torch.manual_seed(0)
    middle = [nn.Linear(12, 12, bias=False) for _ in range(4)]
    net = nn.Sequential(nn.Embedding(12, 12), nn.Tanh(), *middle[:2], nn.Dropout(0.2), *middle[2:], nn.Linear(12, 12))
    net[7].weight = net[0].weight
    if uses > 2:
        net[2].weight = net[5].weight = net[0].weight
    return net


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(step)
    x = torch.randint(12, (8, 5), generator=draws)
    return x, x * 5 % 12


def steps(trainer: ModelParallelTrainer, first: int, last: int) -> list[tuple[float, ...]]:
    found = []
    for step in range(first, last):
        done = trainer.step(*batch(step))
        found.append((done.loss, done.grad_norm, done.loss_scale, float(done.skipped)))
        found.append((trainer.evaluate(*batch(step)),))
    return found


def make(engine: str, places: Any, uses: int = 2, **settings: Any) -> ModelParallelTrainer:
    settings = {"microbatches": 4, "lr": 1e-2, "max_grad_norm": 1.0, "precision": "fp32"} | settings
    net = model(uses)
    if settings.pop("in_loss", False):
        return ModelParallelTrainer(net[:7], places, engine=engine, loss_fn=TiedLoss(net[0].weight), **settings)
    return ModelParallelTrainer(net, places, engine=engine, **settings)


def train(engine: str, places: Any, cases: list[dict[str, Any]]) -> list[Any]:
    """Of each case, losses, norms, scales and skips of some steps, the model's state (in rank 0), the tied weight."""
    found = []
    with use_backend("reference"):
        for case in cases:
            with make(engine, places, **case) as trainer:
                ours = steps(trainer, 0, 3)
                ours.append({n: p.tolist() for n, p in trainer.state_dict_for_model().items()})
                ours.append(tied_weight(trainer).tolist())  # the same in all processes, at any time
                with torch.no_grad():
                    tied_weight(trainer).mul_(0.5)  # a user's change, made in every process
                found.append([*ours, *steps(trainer, 3, 4)])
    return found


def local(cases: list[dict[str, Any]], count: int) -> list[Any]:
    torch.set_num_threads(1)
    return train("local", devices(count), cases)


CASES: list[dict[str, Any]] = [
    {},
    {"precision": "fp16", "transfer": "int8", "recompute": True},
    {"precision": "bf16", "schedule": "zb"},
    {"schedule": "interleaved", "uses": 4},
    {"in_loss": True, "precision": "fp16"},
    {"optimizer": torch.optim.Adagrad},
]


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (3, [{"uses": 4}, {"uses": 4, "precision": "fp16"}])])
def test_it_trains_as_in_one_process(ranks: int, cases: list[dict[str, Any]]) -> None:
    first, *others = in_ranks(ranks, train, "distributed", "auto", cases)
    for case, own, wanted in zip(cases, first, local(cases, ranks), strict=True):
        assert own == wanted, case
    for theirs in others:
        for one, own in zip(theirs, first, strict=True):
            state = [k for k, row in enumerate(own) if isinstance(row, dict)]
            assert [row for k, row in enumerate(one) if k not in state] == [
                row for k, row in enumerate(own) if k not in state
            ]


def go_on(engine: str, places: Any, folder: str, before: str, after: str) -> Any:
    """Two steps from a checkpoint, and one more."""
    with use_backend("reference"), make(engine, places, 4, precision="fp16") as trainer:
        trainer.prepare(*batch(0))
        if before:
            trainer.load(Path(folder) / before)
        values = tied_weight(trainer).tolist()
        found = steps(trainer, 2 * int(after), 2 * int(after) + 2)
        trainer.save(Path(folder) / after)
        return values, found


@pytest.mark.usefixtures("one_thread")
def test_checkpoints_are_those_of_one_process_and_any_number_goes_on_from_them(tmp_path: Path) -> None:
    for name in ("local", "ranks"):
        (tmp_path / name).mkdir()
    for index, count in enumerate((1, 3, 2, 1)):
        before, after = str(index) if index else "", str(index + 1)
        wanted = go_on("local", devices(count), str(tmp_path / "local"), before, after)
        if count == 1:
            everyones = [go_on("local", devices(1), str(tmp_path / "ranks"), before, after)]
        else:
            everyones = in_ranks(count, go_on, "distributed", "auto", str(tmp_path / "ranks"), before, after)
        assert everyones[0] == wanted
        assert all(theirs == wanted for theirs in everyones if not math.isnan(theirs[0][0][0]))
        same = [tmp_path / name / after / "tensors.safetensors" for name in ("local", "ranks")]
        assert same[0].read_bytes() == same[1].read_bytes()


def by_hand(engine: str, places: Any) -> Any:
    """Updates of the user's own, with an optimizer of the user's own over what has gradients."""
    with use_backend("reference"), make(engine, places) as trainer:
        found = []
        for step in range(3):
            found.append(trainer.forward_backward(*batch(step), keep_outputs=False)[0].item())
            torch.optim.SGD(trainer.parameters(), lr=0.5).step()
        return [*found, trainer.evaluate(*batch(3)), *steps(trainer, 3, 5)]


def unusual() -> list[str]:
    """A hook on a tied weight is refused; a frozen one is not sent."""
    said = []
    with make("distributed", "auto") as trainer:
        trainer.step(*batch(0))
        weight = tied_weight(trainer)
        handle = weight.register_hook(lambda grad: grad)
        try:
            trainer.step(*batch(0))
        except ValueError as error:
            said.append(str(error))
        handle.remove()
        weight.requires_grad_(False)
        before = weight.tolist()
        trainer.step(*batch(1))
        said.append(str(weight.tolist() == before))
    return said


def others_of_two() -> tuple[Any, list[str]]:
    return by_hand("distributed", "auto"), unusual()


@pytest.mark.usefixtures("one_thread")
def test_updates_of_the_users_own_and_what_is_refused() -> None:
    wanted = by_hand("local", devices(2))
    for found, (hook, frozen) in in_ranks(2, others_of_two):
        assert found == wanted
        assert hook.startswith("0.weight is used in stages 0 and 1 and has a hook")
        assert frozen == "True"


def side_by_side(folder: str, **settings: Any) -> Any:
    with (
        use_backend("reference"),
        make("distributed", "auto", replicas=2, microbatches=2, max_grad_norm=None, **settings) as trainer,
    ):
        found = steps(trainer, 0, 3)
        trainer.save(folder)
        return [*found, *steps(trainer, 3, 5)], tied_weight(trainer).tolist()


def one_beside(folder: str, **settings: Any) -> list[float]:
    with use_backend("reference"), make("local", devices(1), max_grad_norm=None, **settings) as trainer:
        found = [] if folder else steps(trainer, 0, 3)
        trainer.prepare(*batch(0))
        if folder:
            trainer.load(folder)
        return [row[0] for row in [*found, *steps(trainer, 3, 5)]]


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}, {"grad_wire": "fp16"}])
def test_pipelines_side_by_side_have_one_weight(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    everyones = in_ranks(4, partial(side_by_side, **settings), str(tmp_path / "saved"))
    assert all(theirs == everyones[0] for theirs in everyones)
    found = [row[0] for row in everyones[0][0]]  # losses of steps and evaluations in turns
    exact = not settings  # neither weights nor gradients are rounded
    settings.pop("grad_wire", None)
    bound = 4 * torch.finfo(torch.float32).eps * found[0]  # the loss of a batch is a sum in another order
    assert abs(one_beside(str(tmp_path / "saved"), **settings)[0] - found[6]) <= bound
    if exact:
        whole = one_beside("", **settings)
        assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) <= bound
    assert found[0] > found[-1]


def lose_in_the_exchange() -> str:
    """The other process ends after its last backward; what is said of it."""
    with make("distributed", "auto") as trainer:
        trainer.step(*batch(0))
        if dist.get_rank() == 1:
            trainer._spread._peers.reduce = lambda: os._exit(1)  # type: ignore[union-attr, method-assign]
        try:
            trainer.step(*batch(1))
        except ConnectionError as error:
            return str(error)
    return "no error"


def test_a_process_that_is_lost_in_the_exchange_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1:\nit ended without a word") as failed:
        in_ranks(2, said_into, str(tmp_path / "said"))
    assert "rank 0:" not in str(failed.value)
    said = (tmp_path / "said").read_text()
    assert said.startswith(
        "rank 0 exchanged the gradients of weights that several stages use with rank 1, which has ended"
    )


def said_into(place: str) -> None:
    Path(place).write_text(lose_in_the_exchange())
