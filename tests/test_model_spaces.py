"""What a layer keeps in containers and objects is, in a second run, what the first run found there."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import WIDTH, assert_equals_plain, batch, model_of, trainer
from torch import nn

from spu.model.spaces import spaces_of

pytestmark = pytest.mark.usefixtures("reference")


class Notes:
    """An object of the user's."""

    def __init__(self) -> None:
        self.calls = 0
        self.means: list[torch.Tensor] = []


class Held(nn.Module):
    """Counts its calls, and keeps means, in what its attributes hold; ``count`` does so and returns the calls."""

    def __init__(self, held: Any, count: Callable[[Any, torch.Tensor], int]) -> None:
        super().__init__()
        self.held, self.count = held, count
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.gain * self.count(self.held, x.detach().mean()))


def in_dict(held: Any, mean: torch.Tensor) -> int:
    held["calls"] = held.get("calls", 0) + 1
    return int(held["calls"])


def in_list(held: Any, mean: torch.Tensor) -> int:
    held.append(mean)
    return len(held)


def in_set(held: Any, mean: torch.Tensor) -> int:
    held.add(len(held))
    return len(held)


def in_object(held: Any, mean: torch.Tensor) -> int:
    held.calls += 1
    held.means.append(mean)
    return int(held.calls) + len(held.means)


def within(held: Any, mean: torch.Tensor) -> int:
    held["notes"][0][1].setdefault("means", []).append(mean)
    return len(held["notes"][0][1]["means"])


def in_tensor(held: Any, mean: torch.Tensor) -> int:
    held["calls"].add_(1)
    return int(held["calls"])


def last_used(held: Any, mean: torch.Tensor) -> int:
    """Order counts too."""
    held.move_to_end(next(iter(held)))
    return int(next(iter(held)))


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor], int]]] = {
    "dict": (dict, in_dict),
    "counter": (collections.Counter, in_dict),
    "list": (list, in_list),
    "deque": (collections.deque, in_list),
    "set": (set, in_set),
    "object": (Notes, in_object),
    "within others": (lambda: collections.defaultdict(list, notes=[(1, {})]), within),
    "tensor": (lambda: {"calls": torch.zeros(())}, in_tensor),
    "order": (lambda: collections.OrderedDict.fromkeys([1, 2, 3]), last_used),
}


@pytest.mark.parametrize("name", HELD)
def test_recompute_begins_from_what_containers_and_objects_held(name: str) -> None:
    """A second run counted once more, and its gradients were those of another forward."""
    make, count = HELD[name]
    models = [model_of(Held(make(), count), nn.Tanh()) for _ in range(2)]
    runs = []
    for own, recompute in zip(models, [False, True]):
        with trainer(own, 1, microbatches=4, recompute=recompute) as made:
            loss, _ = made.forward_backward(*batch())
            runs.append([loss, *(p.grad.clone() for p in own.parameters() if p.grad is not None)])
    for have, want in zip(*runs, strict=True):
        assert_equal(have, want)
    one, two = (own[1].held for own in models)
    if isinstance(one, Notes):
        assert (one.calls, len(one.means)) == (two.calls, len(two.means)) == (4, 4)
    else:
        assert len(one) == len(two)
        assert list(one)[:3] == list(two)[:3]


def test_a_tensor_in_several_places_is_one_in_the_second_run_too() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.held = [self.calls]
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.held[0].add_(1)
            return torch.tanh(x * self.gain * float(self.calls))

    assert_equals_plain(model_of(Shared()), *batch(), passes=2, schedule="gpipe", ranks=1, virtual=1, recompute=True)


def test_a_layer_that_holds_data_is_not_walked_through() -> None:
    """A layer may refer to a data set, or to another module, which are none of its state."""
    layer = nn.Linear(2, 2)
    layer.data, layer.other, layer.own = list(range(100_000)), [nn.Linear(2, 2)], {"a": [1]}  # type: ignore[assignment]
    assert [space.key for space in spaces_of(layer) if space.key] == ["other", "own", "own['a']"]
