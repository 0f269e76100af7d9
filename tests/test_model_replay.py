"""Replays are exact: a run that is repeated in the backward, by us or by the user, finds what the first run found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import (
    WIDTH,
    assert_equals_plain,
    batch,
    every_schedule,
    model_of,
    some_schedules,
    trainer,
    with_and_without_recompute,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from spu import StageError

pytestmark = pytest.mark.usefixtures("reference")


class Gain(nn.Module):
    """Dropout of the input times a gain, run by ``how``."""

    def __init__(self, how: Callable[[Callable[..., Any], torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(lambda t: F.dropout(t * self.gain, 0.5) * F.dropout(t, 0.3), x)


class SavedState(torch.autograd.Function):
    """As a reversible network does it: nothing of the forward is kept but its input and the generator's state."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.state = run, torch.get_rng_state()
        ctx.save_for_backward(x, *weights)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            x = x.detach().requires_grad_()
            found = torch.autograd.grad(ctx.run(x), (x, *weights), gradient)
        return (None, *found)


WAYS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "checkpoint": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "twice": lambda run, x: checkpoint(lambda t: checkpoint(run, t, use_reentrant=False), x, use_reentrant=False),
}


@with_and_without_recompute
@pytest.mark.parametrize("way", WAYS)
@some_schedules
def test_the_users_own_checkpoint_draws_again_what_it_drew(
    schedule: str, ranks: int, virtual: int, way: str, recompute: bool
) -> None:
    """The recomputation in the backward drew from the process's generator: the gradient was of another mask."""
    assert_equals_plain(
        model_of(Gain(WAYS[way]), nn.Tanh(), Gain(WAYS[way])),
        *batch(),
        schedule=schedule,
        ranks=ranks,
        virtual=virtual,
        recompute=recompute,
        passes=2,
    )


@with_and_without_recompute
def test_checkpointing_of_a_hugging_face_decoder(recompute: bool) -> None:
    """The gradient of the values' weights was off by two thirds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, attention_dropout=0.3, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    ids = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for theirs in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        if theirs:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with trainer(model, recompute=recompute) as t:
            loss, _ = t.forward_backward(ids, ids.roll(-1, 1))
        found.append([loss, *(p.grad for p in model.parameters())])
    for ours, plain in zip(*found, strict=True):
        assert_equal(ours, plain)


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SavedState.apply(lambda t: F.dropout(t * self.gain, 0.5), x, self.gain)


@with_and_without_recompute
@every_schedule
def test_a_function_that_saves_and_sets_the_generators_state(
    schedule: str, ranks: int, virtual: int, recompute: bool
) -> None:
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": recompute}
    assert_equals_plain(model_of(Reversible(), nn.Tanh(), Reversible()), *batch(), **settings)


def test_states_saved_and_set_in_a_forward_are_the_layers() -> None:
    class Forks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.random.fork_rng():
                first = torch.rand(x.shape)
            state = torch.get_rng_state()
            second = torch.rand(x.shape)
            torch.set_rng_state(state)
            zero = torch.rand(x.shape) - second + first - second
            torch.manual_seed(3)
            return x + first * torch.rand(x.shape) + 1000 * zero

    model = model_of(Forks(), Forks())
    before = torch.get_rng_state()
    assert_equals_plain(model, *batch(), recompute=True)
    assert_equal(torch.get_rng_state(), before)
    assert torch.random.default_generator is torch.default_generator


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + torch.rand_like(gradient)


class Noisy(nn.Module):
    def __init__(self, function: Any = NoisyGradient) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x)


def test_what_draws_in_a_backward_draws_the_same_in_every_pipeline() -> None:
    found = []
    for schedule, ranks, virtual, recompute in [
        ("gpipe", 1, 1, False),
        ("gpipe", 3, 1, True),
        ("1f1b", 2, 1, False),
        ("zbv", 2, 2, True),
    ]:
        torch.manual_seed(len(found))
        torch.rand(3)
        model = model_of(Noisy(), nn.Tanh(), Noisy())
        with trainer(model, ranks, schedule=schedule, virtual=virtual, recompute=recompute) as t:
            t.forward_backward(*batch())
            first = model[0].weight.grad.clone()
            t.forward_backward(*batch())
        assert not torch.equal(first, model[0].weight.grad)
        found.append([first, *(p.grad for p in model.parameters())])
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert_equal(ours, theirs)


# What a layer keeps from one microbatch to the next


class RunningMean(nn.Module):
    """Reads a running mean before, and changes it."""

    def __init__(self, change: Callable[[nn.Module, torch.Tensor], None], width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.mean[:WIDTH].clone()
        self.change(self, x.detach().mean(0))
        return torch.tanh((x - mean) * self.gain)


def lerp(layer: Any, mean: torch.Tensor) -> None:
    layer.mean[:WIDTH].lerp_(mean, 0.5)


def through_data(layer: Any, mean: torch.Tensor) -> None:
    layer.mean.data.mul_(0.5).add_(mean, alpha=0.5)


def replaced(layer: Any, mean: torch.Tensor) -> None:
    layer.mean = 0.5 * layer.mean + 0.5 * mean


class Attributes(nn.Module):
    """The same with what is no buffer: a tensor, a number, and one that is not there at first."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(WIDTH)
        self.calls = 0
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if not hasattr(self, "first"):
            self.first = x.detach().mean()
        out = torch.tanh((x - self.mean) * self.gain * self.calls + self.first)
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return out


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), [("gpipe", 1, 1), ("1f1b", 3, 1)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: RunningMean(lerp),
        lambda: RunningMean(lerp, 1 << 15),
        lambda: RunningMean(through_data),
        lambda: RunningMean(replaced),
        Attributes,
    ],
)
def test_recompute_begins_from_what_the_first_run_found(
    make: Callable[[], nn.Module], schedule: str, ranks: int, virtual: int
) -> None:
    """It began from the buffers of the moment, which later microbatches had changed."""
    torch.manual_seed(0)
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": True}
    assert_equals_plain(model_of(make(), nn.Tanh(), make()), *batch(), passes=2, **settings)


def test_a_large_buffer_that_only_some_microbatches_change_is_named() -> None:
    class Late(RunningMean):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) if self.calls > 2 else x * self.mean[:WIDTH]

    x, y = batch()
    model = model_of(Late(lerp, 1 << 15))
    with (
        trainer(model, 1, schedule="gpipe", recompute=True) as t,
        pytest.raises(StageError, match=r"'1.mean' was changed in this microbatch.*recompute=False"),
    ):
        t.step(x, y)


class AddsInPlace(nn.Module):
    def __init__(self, begins: int = 0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.calls, self.begins = 0, begins

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.begins:
            x += 1
        return torch.tanh(x * self.gain)


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), [("gpipe", 1, 1), ("1f1b", 3, 1), ("zbv", 2, 2)])
def test_recompute_of_a_layer_that_changes_its_input(schedule: str, ranks: int, virtual: int) -> None:
    """It was refused where no module of it said so (``inplace=True``)."""
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": True}
    assert_equals_plain(model_of(AddsInPlace(), nn.Linear(WIDTH, WIDTH), AddsInPlace()), *batch(), passes=2, **settings)


def test_recompute_of_a_layer_that_begins_to_change_its_input_is_refused() -> None:
    message = "layer '1' changes its input in place in this microbatch, and did not in those before"
    with trainer(model_of(AddsInPlace(2)), recompute=True) as t, pytest.raises(StageError, match=message):
        t.step(*batch())


class ChangesWhatIsSaved(nn.Module):
    """Changes in place what an operator has saved for its backward; it is used only where ``used`` is set."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x) if self.used else x * 1
        if not self.used:
            h.square()  # saves h for a backward that never runs
        return self.inner(h.mul_(2))


@with_and_without_recompute
def test_a_saved_tensor_that_is_changed_in_place_is_refused(recompute: bool) -> None:
    """Recompute gave a gradient of the changed values: torch's checkpoint does not compare versions."""
    refused = pytest.raises(StageError, match="modified by an inplace operation|layer '1' changes in place a tensor")
    with trainer(model_of(ChangesWhatIsSaved(True)), recompute=recompute) as t, refused:
        t.step(*batch())


@with_and_without_recompute
@some_schedules
def test_a_saved_tensor_that_no_backward_uses_may_change(
    schedule: str, ranks: int, virtual: int, recompute: bool
) -> None:
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": recompute}
    assert_equals_plain(model_of(ChangesWhatIsSaved(False), nn.Tanh()), *batch(), passes=2, **settings)


class ChangesItsWeight(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.change(self.weight)
        return torch.tanh(x @ self.weight)


def test_recompute_of_a_layer_that_keeps_its_weight_in_bounds() -> None:
    model = model_of(ChangesItsWeight(lambda w: w.clamp_(-0.2, 0.2)))
    assert_equals_plain(model, *batch(), schedule="gpipe", ranks=1, microbatches=1, recompute=True)


def test_recompute_of_a_layer_that_changes_its_weight_again_is_refused() -> None:
    """The weight was changed twice a step, and the gradient was that of the second value."""
    refused = pytest.raises(StageError, match="layer '1' changes its own weights in place, and a second run changes")
    with trainer(model_of(ChangesItsWeight(lambda w: w.mul_(1.5))), 1, recompute=True, microbatches=1) as t, refused:
        t.step(*batch())


class Penalty(nn.Module):
    """Hands on the gradient of a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = x if x.requires_grad else x.detach().requires_grad_()
        inner = torch.tanh(F.dropout(x, 0.2) @ self.weight)
        (slope,) = torch.autograd.grad(inner.sum(), x, create_graph=True)
        return inner + slope * self.count.clone()


@with_and_without_recompute
@every_schedule
def test_a_layer_may_run_a_backward_of_its_own(schedule: str, ranks: int, virtual: int, recompute: bool) -> None:
    """With recompute it ended in an error about the context, which was entered a second time."""
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": recompute}
    assert_equals_plain(model_of(Penalty(), nn.Tanh(), Penalty()), *batch(), **settings)
