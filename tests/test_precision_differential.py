"""Random sequences of everything a loop may do with gradients: spu.GradScaler decides as torch's does, after each call.

Two worlds run the same sequence: plain layers with torch.amp.GradScaler, accelerated ones with spu.GradScaler.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from thorough import ALL
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

import spu
from spu.ops import use_backend

SEQUENCES, CALLS = 250 if ALL else 120, 30

pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")


def make_models() -> nn.ModuleList:
    """Two models: fused layers, plain ones, a tied weight, a sparse gradient."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 4, sparse=True)
            self.body = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4, bias=False), nn.LayerNorm(4))
            self.head = nn.Linear(4, 6, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.body(self.table(ids))
            return self.head(h) + self.head.weight.sum(1)  # one weight, used by a fused op and by a plain one

    return nn.ModuleList([Table(), Table()])


class World:
    """Models, optimizers and scaler of one class."""

    def __init__(self, scaler_class: type, models: nn.ModuleList, joint: bool, name: str) -> None:
        self.models = models
        self.scaler = scaler_class("cpu", init_scale=2.0**8, growth_interval=2)
        self.first_params = list(models[0].parameters())
        groups: list[list[dict[str, Any]]] = [
            [{"params": [p for p in model.parameters() if p.dim() > 1]},
             {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.02}]
            for model in models
        ]  # fmt: skip
        make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
            "sgd": lambda g: torch.optim.SGD(g, lr=0.01),
            "adagrad": lambda g: torch.optim.Adagrad(g, lr=0.01, foreach=False),
        }
        self.optimizers = [make[name](groups[0] + groups[1])] if joint else [make[name](group) for group in groups]

    def params(self, which: int) -> list[nn.Parameter]:
        return list(self.models[which].parameters())

    def loss(self, which: int, factor: float) -> Tensor:
        ids = torch.arange(6)
        return self.models[which](ids).square().mean() * factor

    def backward(self, which: int, factor: float, times: int) -> None:
        for _ in range(times):
            self.scaler.scale(self.loss(which, factor)).backward()

    def backward_both(self, factor: float) -> None:
        first, second = self.scaler.scale([self.loss(0, factor), self.loss(1, 1.0)])
        (first + second).backward()

    def zero_grad(self, which: int, set_to_none: bool) -> None:
        self.models[which].zero_grad(set_to_none=set_to_none)

    def dense(self, which: int) -> list[Tensor]:
        return [p.grad for p in self.params(which) if p.grad is not None and p.grad.layout == torch.strided]

    def poison(self, which: int, index: int, value: float, how: str) -> None:
        """Writes of which the version counter tells, and such of which it does not."""
        grads = self.dense(which)
        if not grads:
            return
        grad = grads[index % len(grads)]
        if how == "data":
            grad.data.view(-1)[0] = value
        elif how == "numpy":
            grad.detach().numpy().reshape(-1)[0] = value
        else:
            grad.fill_(value)

    def repair(self, which: int, how: str) -> None:
        for grad in self.dense(which):
            if how == "zero":
                grad.zero_()
            else:
                (grad.data if how == "data" else grad).nan_to_num_(0.0, 0.0, 0.0)

    def replace(self, which: int, factor: float) -> None:
        for p in self.params(which):
            if p.grad is not None:
                p.grad = p.grad.clone() * factor

    def views_of_one_buffer(self, which: int) -> None:
        params = self.params(which)[1:]  # all but the sparse one
        flat = torch.zeros(sum(p.numel() for p in params))
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.view(p.shape)

    def strided_otherwise(self, which: int) -> None:
        for p in self.params(which)[1:]:
            p.grad = torch.zeros(p.shape[::-1]).t() if p.dim() == 2 else None

    def by_hand(self, which: int, factor: float) -> None:
        """Scaled gradients of torch.autograd.grad, put into place: where ``grad`` was not cleared since a backward,
        ours takes them for gradients at true scale."""
        params = self.params(which)[1:]
        grads = torch.autograd.grad(self.scaler.scale(self.loss(which, factor)), params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    def optimizer(self, which: int) -> torch.optim.Optimizer:
        return self.optimizers[which % len(self.optimizers)]

    def unscale(self, which: int) -> None:
        self.scaler.unscale_(self.optimizer(which))

    def clip(self, which: int) -> None:
        nn.utils.clip_grad_norm_(self.params(which)[1:], 0.1)

    def step(self, which: int) -> None:
        self.scaler.step(self.optimizer(which))

    def update(self, new_scale: float | None) -> None:
        self.scaler.update(new_scale)

    def whole_step(self, which: int, factor: float, set_to_none: bool) -> None:
        self.zero_grad(which, set_to_none)
        self.backward(which, factor, 1)
        self.scaler.step(self.optimizer(which))
        self.scaler.update()


def random_call(rng: random.Random) -> tuple[str, tuple[Any, ...]]:
    which, bad = rng.randrange(2), rng.choice([1.0, 1.0, 1.0, float("inf"), float("nan")])
    calls: list[tuple[int, str, tuple[Any, ...]]] = [
        (6, "backward", (which, bad, rng.choice([1, 1, 2]))),
        (2, "backward_both", (bad,)),
        (3, "zero_grad", (which, rng.random() < 0.5)),
        (2, "poison", (which, rng.randrange(8), rng.choice([0.5, float("inf"), float("nan")]),
                       rng.choice(["data", "numpy", "fill"]))),
        (2, "repair", (which, rng.choice(["zero", "data", "visible"]))),
        (1, "replace", (which, rng.choice([0.5, 1.0]))),
        (1, "views_of_one_buffer", (which,)),
        (1, "strided_otherwise", (which,)),
        (1, "by_hand", (which, bad)),
        (2, "unscale", (which,)),
        (1, "clip", (which,)),
        (5, "step", (which,)),
        (5, "update", (rng.choice([None] * 6 + [64.0]),)),
        (4, "whole_step", (which, bad, rng.random() < 0.5)),
    ]  # fmt: skip
    chosen = rng.choices(calls, [weight for weight, _, _ in calls])[0]
    return chosen[1], chosen[2]


def outcome(world: World, name: str, arguments: tuple[Any, ...]) -> str:
    try:
        getattr(world, name)(*arguments)
    except (RuntimeError, AssertionError) as error:
        return type(error).__name__
    return "done"


def weights(world: World) -> list[Tensor]:
    return [p.detach().clone() for p in world.models.parameters()]


def moved(world: World, before: list[Tensor]) -> list[bool]:
    """For each model: whether its weights changed."""
    size = len(world.first_params)
    pairs = [not torch.equal(p, old) for p, old in zip(world.models.parameters(), before, strict=True)]
    return [any(pairs[:size]), any(pairs[size:])]


class Comparable:
    """Whether the weights are comparable too, and not the decisions alone: not from where torch's class divides by
    another scale than a gradient was multiplied by, or where the loop writes a number whose scale only it knows.
    """

    def __init__(self, world: World) -> None:
        self._world, self._scaled, self.yet = world, set[int](), True

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        contributes = {"backward": arguments[:1], "whole_step": arguments[:1], "backward_both": (0, 1)}.get(name, ())
        for which in contributes:
            optimizer = id(self._world.optimizer(which))
            self.yet &= self._world.scaler._per_optimizer_states[optimizer]["stage"] is OptState.READY
            self._scaled.add(optimizer)
        if name == "clip":  # of torch's scaled gradients, if it does not come after unscale_
            optimizer = id(self._world.optimizer(arguments[0]))
            self.yet &= self._world.scaler._per_optimizer_states[optimizer]["stage"] is not OptState.READY
        self.yet &= name != "by_hand" and not (name == "poison" and arguments[2] == 0.5)
        self._scale = self._world.scaler.get_scale()

    def after(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("unscale", "step", "whole_step"):
            self._scaled.discard(id(self._world.optimizer(arguments[0])))
        if self._scale != self._world.scaler.get_scale():
            self.yet &= not self._scaled


def run_sequence(seed: int) -> int:
    """After how many calls the weights could be compared, and not the decisions alone."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    plain = make_models()
    joint, optimizer = rng.random() < 0.3, rng.choice(["sgd", "adagrad"])
    ours = World(spu.GradScaler, spu.accelerate(copy.deepcopy(plain)), joint, optimizer)
    torchs = World(torch.amp.GradScaler, plain, joint, optimizer)
    comparable, history, compared = Comparable(torchs), [f"seed {seed}"], 0
    for _ in range(CALLS):
        name, arguments = random_call(rng)
        history.append(f"{name}{arguments}")
        told = "\n".join(history)
        before = weights(ours), weights(torchs)
        comparable.before(name, arguments)
        assert outcome(ours, name, arguments) == outcome(torchs, name, arguments), told
        assert moved(ours, before[0]) == moved(torchs, before[1]), told
        assert ours.scaler.state_dict() == torchs.scaler.state_dict(), told
        finite = [all(bool(p.isfinite().all()) for p in world.models.parameters()) for world in (ours, torchs)]
        assert finite[0] == finite[1], told
        if not finite[0]:
            break  # the sequence itself put it there after unscale_
        comparable.after(name, arguments)
        if comparable.yet:
            compared += 1
            for own, theirs in zip(weights(ours), weights(torchs), strict=True):
                assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-5), told
    return compared


@pytest.mark.parametrize("batch", range(10))
@pytest.mark.usefixtures("one_thread")
def test_random_sequences_are_decided_as_torch_decides_them(batch: int) -> None:
    with use_backend("reference"):
        compared = [run_sequence(seed) for seed in range(batch, SEQUENCES, 10)]
    assert sum(compared) > 2 * len(compared)
