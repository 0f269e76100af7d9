"""What a pass changes beside gradients is noted, put back, or named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pipelines import trainer
from torch import Tensor, nn

from spu.engine.attempt import Attempt


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("small", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("large", torch.zeros(1 << 15))
        self.register_buffer("none", None)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.fixture
def held() -> Iterator[tuple[Holder, Attempt]]:
    holder = Holder()
    with trainer(nn.Sequential(nn.Linear(3, 3), holder, nn.Linear(3, 4)), 1) as made:
        made.prepare(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
        assert made._runner is not None
        yield holder, made._runner.attempt


def test_buffers_and_generators_are_put_back(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    small, state = holder.small, holder.generator.get_state()
    for turn in range(2):
        attempt.begin()
        holder.small.add_(1 + turn)
        holder.small = torch.zeros(2, 3)
        torch.rand(2, generator=holder.generator)
        assert attempt.put_back() == ""
        assert holder.small is small
        assert torch.equal(small, torch.arange(6.0).reshape(2, 3))
        assert torch.equal(holder.generator.get_state(), state)
    assert attempt.changes_buffers


def test_values_of_the_user_between_passes_are_the_ones_to_go_back_to(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    attempt.begin()
    attempt.end()
    assert not attempt.changes_buffers
    with torch.no_grad():
        holder.small.fill_(7)
    attempt.begin()
    assert not attempt.changes_buffers  # a forward did not
    holder.small.add_(1)
    attempt.put_back()
    assert torch.equal(holder.small, torch.full((2, 3), 7.0))


def test_a_pass_that_ends_well_shows_what_it_changes(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    attempt.begin()
    holder.large.add_(1)
    attempt.end()
    assert attempt.changes_buffers


def test_what_is_lost_is_named(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    attempt.begin()
    holder.large.add_(1)
    assert attempt.put_back() == "buffer 'large' of (32768,) was changed, and is too large to be kept"
    attempt.begin()
    with torch.no_grad():
        holder.weight.mul_(2)
    assert attempt.put_back() == "a parameter of stage 0 was changed in place"
    x = torch.ones(4, 3)
    attempt.begin({"x": x}, [torch.ones(2)])
    x[0] = 3
    assert attempt.put_back() == "the batch was changed in place"
    attempt.begin({"x": x.requires_grad_()})
    assert "gradients go to tensors outside" in attempt.put_back()
    attempt.begin({"x": x.detach()})
    assert attempt.put_back() == ""


def test_a_batch_of_inference_mode_is_taken(held: tuple[Holder, Attempt]) -> None:
    with torch.inference_mode():
        x = torch.ones(4, 3)
    held[1].begin(x)
    assert held[1].put_back() == ""


def test_a_large_buffer_that_is_replaced_is_put_back(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    large = holder.large
    attempt.begin()
    holder.large = holder.large + 1
    assert attempt.put_back() == ""
    assert holder.large is large


@pytest.mark.parametrize(("training", "tells"), [(True, True), (False, False)])
def test_batch_norms_in_training_are_told(training: bool, tells: bool) -> None:
    norm = nn.BatchNorm1d(3).train(training)
    with trainer(nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 4)), 1) as made:
        made.prepare(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
        assert made._runner is not None
        assert made._runner.attempt.normalizes_batches() is tells


class OwnGenerator(torch.Generator):
    pass


def test_generators_are_found_among_all_attributes_also_of_a_subclass(held: tuple[Holder, Attempt]) -> None:
    holder, attempt = held
    holder.other = OwnGenerator().manual_seed(2)
    holder.name, holder.kind, holder.none_at_all = "generator", torch.Generator, None
    state = holder.other.get_state()
    attempt.begin()
    torch.rand(2, generator=holder.other)
    assert attempt.put_back() == ""
    assert torch.equal(holder.other.get_state(), state)
