"""The forms in which AdamW's moments are kept: sizes, rounding to nearest, and what happens to special values."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_equal
from torch import Tensor

from spu.ops.moments import MOMENTS, fits, load_moment, moment_bytes, moments_of, new_moment, stored_moment

CPU = torch.device("cpu")


def kept(values: Tensor, moments: str, signed: bool) -> Tensor:
    return load_moment(stored_moment(values, moments, signed=signed), values.shape, signed=signed)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (64,), (129,)], ids=str)
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_new_moment_is_zeros_of_its_form(moments: str, shape: tuple[int, ...]) -> None:
    made = new_moment(shape, moments, CPU)
    assert moments_of(made) == moments
    assert fits(made, shape)
    assert_equal(load_moment(made, shape, signed=True), torch.zeros(shape))
    assert_equal(stored_moment(torch.zeros(shape), moments, signed=False), made)
    if moments == "int8":
        assert made.numel() == moment_bytes(torch.Size(shape).numel())
        assert not fits(made, (1000,))


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"moments is 'fp8': choose one of 'fp32', 'bf16', 'int8'"):
        new_moment((3,), "fp8", CPU)


@pytest.mark.parametrize("signed", [True, False])
def test_values_within_a_factor_of_their_blocks_largest_keep_their_size(signed: bool) -> None:
    largest = torch.logspace(-30, 30, 50)[:, None]
    values = largest * torch.logspace(-4.7, 0, 64)
    if signed:
        values = values * (1 - 2 * (torch.arange(64) % 2))
    got = kept(values, "int8", signed)
    worst = ((got - values).abs() / values.abs()).max()
    assert worst <= (2**-4 if signed else 2**-5) * 1.001, "half a step of 3 or 4 mantissa bits"
    assert_equal(got.abs().amax(1), values.abs().amax(1), "the largest of a block")
    assert_equal(kept(got, "int8", signed), got, "what is kept, kept again")


def test_special_values() -> None:
    values = torch.rand(5 * 64).view(5, 64)
    values[0, 3], values[1, 5], values[2], values[3] = float("nan"), float("inf"), 0.0, 1e-40
    values[1, 6] = 0.0
    assert bool(kept(values, "int8", True)[:2].isnan().all()), "a block is lost as a whole, and says so"
    got = kept(values, "int8", False)
    assert bool(got[0].isnan().all())
    assert bool((got[1] == float("inf")).all()), "a square may overflow, and moves nothing then"
    assert_equal(got[2:4], torch.zeros(2, 64))
    assert bool((got[4] > 0).all())
    tiny = torch.full((64,), 1e-12)
    tiny[0] = 1.0
    assert bool((kept(tiny, "int8", False) > 0).all()), "a second moment is never rounded to 0"
    assert_equal(kept(values, "bf16", True), values.bfloat16().float())
