"""Tensors, also those that share memory, go from stage to stage as they go from layer to layer in the plain model."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from pipelines import SCHEDULES, SOME_SCHEDULES, assert_equals_plain, batch, trainer, with_and_without_recompute
from torch import nn

from spu import StageError, skips

pytestmark = pytest.mark.usefixtures("reference")

WIDTH = 16


class Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any], width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, WIDTH)
        self.fn = fn

    def forward(self, x: Any) -> Any:
        return self.fn(self.linear, x)


class Relu(nn.ReLU):
    """In place on the first of several."""

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return super().forward(x)
        if isinstance(x, dict):
            return {**x, "a": super().forward(x["a"])}
        return (super().forward(x[0]), *x[1:])


def layers(first: Callable[..., Any], last: Callable[..., Any], *middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), Fn(first), *middle, Fn(last), nn.Linear(WIDTH, 4))


def same_twice(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return h, h


def whole_and_part(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return h, h[:, :8]


def part_and_whole(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return h[:, 4:12], h


def reshaped(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return h, h.view(-1, 4, 4).transpose(1, 2)


def detached(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return h, h.detach()


def in_a_dict(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    return {"a": h, "b": [h[:, 1:], None, 3, "text", h]}


def halves(linear: nn.Module, x: torch.Tensor) -> Any:
    a, b = linear(x).chunk(2, 1)
    return a, b


def kinds(linear: nn.Module, x: torch.Tensor) -> Any:
    h = linear(x)
    z = torch.view_as_complex(h.view(-1, WIDTH // 2, 2))
    return h * 1.0, z * 1j, h > 0, (h * 10).long(), h.detach().exp(), None, torch.zeros(()), 2.5


def total(linear: nn.Module, tree: Any) -> torch.Tensor:
    parts = torch.utils._pytree.tree_leaves(tree)
    found: list[Any] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = torch.view_as_real(part) if part.is_complex() else part.float()
            found.append(part.reshape(len(part), -1).mean(1, keepdim=True) if part.dim() else part)
    first = parts[0]
    return linear(F.pad(first, (0, WIDTH - first.shape[1]))) + sum(found)


OUTPUTS = [same_twice, whole_and_part, part_and_whole, reshaped, detached, in_a_dict, halves, kinds]


@pytest.mark.parametrize(
    ("make", "middle", "schedule", "recompute"), covering(OUTPUTS, (nn.Identity, Relu), SOME_SCHEDULES, (False, True))
)
def test_outputs_that_share_memory(
    make: Callable[..., Any], middle: type[nn.Module], schedule: tuple[str, int, int], recompute: bool
) -> None:
    """Each had a graph of its own: a change in place of one lost half of the other's gradient."""
    if make is halves:  # two parts of one tensor: test_overlapping_parts_that_are_changed_are_named
        middle = nn.Identity
    settings = way(schedule, recompute)
    if middle is Relu:
        settings["same_order"] = make not in (whole_and_part, in_a_dict)
    assert_equals_plain(layers(make, total, middle()), *batch(), **settings)


def way(schedule: tuple[str, int, int], recompute: bool) -> dict[str, Any]:
    return dict(zip(("schedule", "ranks", "virtual"), schedule)) | {"recompute": recompute}


@pytest.mark.parametrize("make", [same_twice, whole_and_part, reshaped, in_a_dict])
def test_outputs_that_share_memory_between_five_stages_and_packed(make: Callable[..., Any]) -> None:
    same_order = make in (same_twice, reshaped)
    assert_equals_plain(layers(make, total, nn.Identity(), Relu()), *batch(), ranks=6, same_order=same_order)
    model = layers(make, total, Relu())
    found = []
    for stages in (1, 5):
        with trainer(model, stages, transfer="none" if stages == 1 else "fp16") as t:
            t.forward_backward(*batch())
        found.append([p.grad.clone() for p in model.parameters()])
    for exact, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, exact, rtol=0.02, atol=2e-3)


class Input(nn.Module):
    """What a layer returns of its own input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        return {"itself": x, "view": x.view(x.shape), "part": x[:, :WIDTH], "twice": (x, x)[0]}[self.how]


@pytest.mark.parametrize(
    ("how", "schedule", "recompute"), covering(("itself", "view", "part", "twice"), SOME_SCHEDULES, (False, True))
)
def test_a_layer_returns_its_input(how: str, schedule: tuple[str, int, int], recompute: bool) -> None:
    model = layers(
        lambda linear, x: linear(x), lambda linear, x: linear(x), Input(how), nn.ReLU(inplace=True), Input(how)
    )
    assert_equals_plain(model, *batch(), **way(schedule, recompute))


@with_and_without_recompute
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "fork", [lambda h: (h, h.view(-1, 4, 4)), lambda h: (h.view(-1, 4, 4).flatten(1), h), lambda h: (h, h)]
)
def test_a_change_in_place_reaches_the_fork_of_its_input(ranks: int, fork: Callable[..., Any], recompute: bool) -> None:
    """Recompute ran such a layer on a copy of its input: the fork kept its values, and the loss was wrong."""
    model = layers(lambda linear, x: fork(linear(x)), total, Relu())
    assert_equals_plain(model, *batch(), ranks=ranks, recompute=recompute, passes=2)


@with_and_without_recompute
def test_a_stashed_tensor_is_changed_in_the_same_stage(recompute: bool) -> None:
    assert_equals_plain(stashing(Relu()), *batch(), ranks=1, recompute=recompute, passes=2)


def stashing(*middle: nn.Module) -> nn.Sequential:
    def stash(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = linear(x)
        skips.stash("a", h)
        return h

    return layers(stash, lambda linear, x: linear(x) + skips.pop("a"), *middle)


@pytest.mark.parametrize(("ranks", "transfer"), [(3, "none"), (5, "none"), (5, "fp16")])
@pytest.mark.parametrize("middle", [[Relu()], [nn.Identity(), Relu()]])
def test_a_stashed_tensor_that_another_stage_changes_is_named(
    ranks: int, transfer: str, middle: list[nn.Module]
) -> None:
    """The stashing layer's gradient was off by three quarters."""
    if transfer != "none" and len(middle) > 1:
        pytest.skip("a copy of a copy: it has no memory in common with what was stashed")
    with (
        trainer(stashing(*middle), ranks, transfer=transfer) as t,
        pytest.raises(StageError, match=r"in place.*clone|'a', which was stashed, has too"),
    ):
        t.step(*batch())
    model = stashing(nn.Identity(), nn.ReLU())
    assert_equals_plain(model, *batch(), ranks=5)


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("zbv", 2)])
def test_overlapping_parts_that_are_changed_are_named(schedule: str, virtual: int) -> None:
    def overlap(linear: nn.Module, x: torch.Tensor) -> Any:
        h = linear(x)
        return h[:, :10], h[:, 6:]

    with (
        trainer(layers(overlap, total, Relu()), 5 // virtual, schedule=schedule, virtual=virtual) as t,
        pytest.raises(
            StageError, match="changes its input in place, whose memory another output of the same layer has"
        ),
    ):
        t.step(*batch())
    assert_equals_plain(layers(overlap, total, nn.Identity()), *batch(), ranks=5)


class OwnParameter(nn.Module):
    def __init__(self, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(2, WIDTH))
        self.part = part

    def forward(self, x: torch.Tensor) -> Any:
        return x, self.part(self.shift)


class AddTo(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, tree: Any) -> torch.Tensor:
        x, shift = tree
        if self.in_place:
            shift += 1
        return torch.tanh(x + shift.sum(0))


@pytest.mark.parametrize(
    ("part", "schedule", "recompute"),
    covering((lambda p: p, lambda p: p[:1], lambda p: p * 1), SCHEDULES, (False, True)),
)
def test_a_parameter_is_handed_on(part: Callable[..., Any], schedule: tuple[str, int, int], recompute: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), OwnParameter(part), AddTo(False), nn.Linear(WIDTH, 4))
    assert_equals_plain(model, *batch(), **way(schedule, recompute))


@pytest.mark.parametrize("part", [lambda p: p, lambda p: p[:1]])
def test_a_parameter_that_a_later_stage_would_change_is_left_alone(part: Callable[..., Any]) -> None:
    """Plain autograd refuses it; in a pipeline the parameter was changed without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), OwnParameter(part), AddTo(True), nn.Linear(WIDTH, 4))
    before = model[1].shift.detach().clone()
    with trainer(model, 4) as t, pytest.raises((StageError, ValueError), match="leaf Variable that requires grad"):
        t.step(*batch())
    assert torch.equal(model[1].shift, before)


def test_what_needs_no_gradient_arrives_so() -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(nn.Module):
        def forward(self, tree: Any) -> torch.Tensor:
            a, b = tree
            seen.append((a.requires_grad, b.requires_grad))
            return a * b

    model = layers(lambda linear, x: (linear(x), linear(x).detach()), lambda linear, x: linear(x), Look())
    assert_equals_plain(model, *batch(), ranks=5)
    assert set(seen) == {(True, False)}
    model = layers(lambda linear, x: linear(x), lambda linear, x: linear(x))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert_equals_plain(model, *batch(), ranks=4)


def test_a_buffer_that_is_handed_on_is_that_of_its_microbatch() -> None:
    """The next microbatch changed it, perhaps before the next stage had read it."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: torch.Tensor) -> Any:
            self.mean.lerp_(x.detach().mean(0), 0.5)
            return x, self.mean

    model = layers(lambda linear, x: linear(x), lambda linear, x: linear(x[0] - x[1]), Mean(), nn.Identity())
    assert_equals_plain(model, *batch(), ranks=6, schedule="gpipe", passes=2)


# Objects


class Slots:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class Inherited(Slots):
    __slots__ = ()


@dataclass
class Data:
    items: list[Any]


class Own(dict):
    pass


@pytest.mark.parametrize(
    "wrap",
    [
        Slots,
        Inherited,
        lambda h: Data([{"a": h}]),
        lambda h: Own(a=h),
        lambda h: UserDict(a=h),
        lambda h: {h},
        lambda h: lambda: h,
        lambda h: Slots((3, [h])),
    ],
)
def test_an_object_that_hides_tensors_is_named(wrap: Callable[..., Any]) -> None:
    """They crossed uncut, and the backward of one stage ran into the graph of another; slots were not looked into."""

    class Wrap(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(x * 2)

    class Unwrap(nn.Module):
        def forward(self, hidden: Any) -> torch.Tensor:
            return torch.ones(2, WIDTH)

    model = nn.Sequential(nn.Linear(6, WIDTH), Wrap(), Unwrap(), nn.Linear(WIDTH, 4))
    with trainer(model, 4) as t, pytest.raises(StageError, match="layer '1' hands to the next stage a .* with tensors"):
        t.step(*batch())
