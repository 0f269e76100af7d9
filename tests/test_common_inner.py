"""What ops take for themselves while they run is counted, at most as much where a router's choice is not known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spu.common.inner import inner_bytes
from spu.common.torch_private import FakeTensorMode
from spu.common.tracker import MemoryTracker
from spu.ops import schema
from spu.ops.dispatch import status_of

pytestmark = pytest.mark.skipif(not status_of("cpu").available, reason="spu._C is not built")

TOKENS, WIDTH, HIDDEN, EXPERTS = 24, 16, 40, 3


def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
    x, gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, gate_up, down


def experts_peak(dtype: torch.dtype, ends: list[int], *, fake: bool, keep: bool) -> int:
    """Peak bytes of one call, with its results."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = [*values(dtype), torch.tensor(ends)]
    x, gate_up, down, where = (mode.from_tensor(t) for t in given) if fake else given
    with MemoryTracker() as tracker:
        results = schema.overload("experts_mlp", "cpu")(x, where, gate_up, down, "silu", keep)
    assert tracker.tally.live == sum(t.untyped_storage().nbytes() for t in results)
    return tracker.tally.peak


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("ends", "most"), [([8, 16, 24], 8), ([0, 24, 24], 24), ([1, 2, 5], 3), ([0, 0, 0], 0)])
def test_hidden_values_of_the_expert_with_most_rows(dtype: torch.dtype, keep: bool, ends: list[int], most: int) -> None:
    results = TOKENS * (WIDTH + 2 * keep * HIDDEN)
    assert experts_peak(dtype, ends, fake=False, keep=keep) == dtype.itemsize * (results + most * HIDDEN)
    planned = experts_peak(dtype, ends, fake=True, keep=keep)
    assert planned == dtype.itemsize * (results + TOKENS * HIDDEN)  # whatever the router chooses


@pytest.mark.parametrize("fake", [False, True])
def test_hidden_values_of_a_multilayer_perceptron(fake: bool) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = (2, 12, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    given = [torch.randn(shape) for shape in shapes]
    x, w_gate, w_up, w_down = (mode.from_tensor(t) for t in given) if fake else given
    for keep in (False, True):
        with MemoryTracker() as tracker:
            schema.overload("gated_mlp", "cpu")(x, w_gate, w_up, w_down, "silu", keep)
        assert tracker.tally.peak == 4 * TOKENS * (WIDTH + HIDDEN + 2 * keep * HIDDEN)
        with MemoryTracker() as tracker:
            schema.overload("mlp", "cpu")(x, w_gate, None, w_down, None, "gelu", keep)
        assert tracker.tally.peak == 4 * TOKENS * (WIDTH + HIDDEN + keep * HIDDEN)


def test_a_statistic_for_each_group_of_a_losss_columns() -> None:
    hidden, weight, target = torch.randn(10, 8), torch.randn(600, 8), torch.zeros(10, dtype=torch.int64)
    with MemoryTracker() as tracker:
        schema.overload("linear_ce", "cpu")(hidden, weight, target, -100)
    assert tracker.tally.peak == 10 * (4 + 4 + 3 * 8 + 4)


def test_other_operators_take_nothing() -> None:
    assert inner_bytes(torch.ops.aten.mm.default, [torch.ones(2, 2)] * 2) == 0
    assert inner_bytes(torch.ops.spu.linear.cpu, [torch.ones(2, 2)] * 2) == 0
