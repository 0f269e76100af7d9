"""Masters as a 16-bit weight and a correction: what is exact, what is rounded, and within which bounds."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_equal
from torch import Tensor

from spu.ops.masters import MASTERS, correction_dtype, joined, master_noise, masters_of, split
from spu.ops.moments import noise

HALVES = [torch.float16, torch.bfloat16]
FORMS = ["16bit", "8bit"]


def floats(patterns: Tensor) -> Tensor:
    return (((patterns & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32).view(torch.float32)


def masters() -> Tensor:
    """fp32 values over the whole range, densely where fp16 becomes subnormal and where it ends, both signs."""
    spread = torch.arange(0, 1 << 31, 999_983)
    subnormal = torch.arange(0x36000000, 0x39000000, 1597)
    end = torch.arange(0x477F0000, 0x47810000, 5)
    special = torch.tensor([0, 1, 0x7F7FFFFF, 0x7F800000])
    ties = torch.randint(0, 0x7F80, (2000,)) * 0x10000 + 0x8000
    ties16 = torch.randint(0x38800 >> 2, 0x47800 >> 2, (2000,)) * 0x4000 + 0x1000
    values = torch.cat((spread[spread <= 0x7F800000], subnormal, end, special, ties, ties + 1, ties - 1, ties16))
    return floats(torch.cat((values, values | 0x80000000)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_kept_is_the_master_or_within_its_bound(dtype: torch.dtype, form: str) -> None:
    master = masters()
    kept = joined(*split(master, dtype, form)).double()
    truth, size = master.double(), master.double().abs()
    assert_equal(kept.signbit(), master.signbit(), "signs, of zeros too")
    if dtype == torch.bfloat16:
        finite = master.isfinite()
        assert_equal(kept[~finite], truth[~finite])
        unit = (
            torch.where(size < 2.0**-126, 2.0**-141, 2.0 ** (size.log2().floor() - 15)) if form == "8bit" else 0 * size
        )
        rounded_up = size > 2.0**128 * (1 - 2.0**-17)
        assert bool(((kept - truth).abs() <= unit / 2)[finite & ~rounded_up].all())
        assert bool(kept[finite].isfinite().all()), "nothing finite becomes infinite"
        return
    inside = size < 65_567
    assert bool(((kept.abs() - 65_567).abs() < 1)[~inside].all()), "saturates"
    mantissa, least = (23, 2.0**-40) if form == "16bit" else (18, 2.0**-32)
    unit = torch.maximum(2.0 ** (size.clamp(min=2.0**-149).log2().floor() - mantissa), torch.tensor(least))
    error = (kept - truth).abs()
    assert bool((error <= unit / 2)[inside & (size >= 2.0**-16)].all())
    assert bool((error <= unit)[inside].all())
    if form == "16bit":
        assert_equal(kept[inside & (size >= 2.0**-16)], truth[inside & (size >= 2.0**-16)], "exact")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_weight_is_the_kept_master_rounded_to_nearest(dtype: torch.dtype, form: str) -> None:
    master = masters()
    weight, correction = split(master, dtype, form)
    assert weight.dtype == dtype
    assert correction.dtype == correction_dtype(form)
    kept = joined(weight, correction)
    nearest = kept.to(dtype)
    other = weight != nearest
    if dtype == torch.float16 and form == "16bit":
        assert not other.any(), "ties to even, as fp32 masters are rounded"
        assert_equal(weight, master.to(dtype))
    # a tie: both neighbours are equally far, and the larger magnitude is taken
    away, far = weight.double()[other].abs(), nearest.double()[other].abs()
    ends = torch.tensor(2.0**16 if dtype == torch.float16 else 2.0**128)
    distance = torch.minimum(away, ends) - kept.double()[other].abs()
    assert_equal(distance, kept.double()[other].abs() - far, "ties")
    again = split(kept, dtype, form)
    assert_equal(again[0], weight, "what is kept, kept again")
    assert_equal(again[1], correction, "what is kept, kept again")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_not_a_number_stays_so(dtype: torch.dtype, form: str) -> None:
    nans = floats(torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000]))
    weight, correction = split(nans, dtype, form)
    assert bool(weight.isnan().all())
    assert bool(joined(weight, correction).isnan().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_any_weight_with_any_correction_is_within_half_a_unit_of_the_weight(dtype: torch.dtype, form: str) -> None:
    """A weight that somebody writes meets the correction of the old one."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    kind = correction_dtype(form)
    ends = torch.iinfo(kind)
    for value in (ends.min, ends.min + 1, -1, 0, 1, ends.max):
        master = joined(every, torch.full_like(every, value, dtype=kind))
        assert_equal(master.isnan(), every.isnan())
        finite = every.isfinite()
        got, wide = master.double()[finite], every.double()[finite]
        up = torch.nextafter(every, torch.full_like(every, torch.inf)).double()[finite]
        down = torch.nextafter(every, torch.full_like(every, -torch.inf)).double()[finite]
        largest = 2.0**16 if dtype == torch.float16 else 2.0**128
        up, down = up.clamp(max=largest), down.clamp(min=-largest)
        assert bool(((down + wide) / 2 <= got).all())
        assert bool((got <= (up + wide) / 2).all())
        if value == 0:
            assert_equal(got, wide, "an unused correction")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_is_right_on_average_and_keeps_what_fits(dtype: torch.dtype) -> None:
    every = torch.arange(256)
    for value in (0.7123456, -3e-5, 1.00001, -1234.567, 6e-8):
        master = torch.full((256,), value)
        rounded = joined(*split(master, dtype, "8bit", every)).double()
        low, high = rounded.min().item(), rounded.max().item()
        assert low <= value <= high
        # 8 random bits decide; where the part cut off has fewer (fp16, normal), or more, the mean is within 1/256
        assert abs(rounded.mean().item() - master[0].double().item()) <= (high - low) / 256 + abs(value) * 1e-12
        fits = joined(*split(master, dtype, "8bit"))
        assert_equal(joined(*split(fits, dtype, "8bit", every)), fits)


def test_noise_of_the_master_is_spread_over_its_eight_bits() -> None:
    bits = master_noise(noise(100_000, torch.tensor([7.0])))
    counts = torch.bincount(bits, minlength=256)
    assert counts.numel() == 256
    assert bool((counts > 280).all()), "expected 390 each"


def test_names() -> None:
    assert masters_of(torch.zeros(1)) == MASTERS[0]
    assert masters_of(torch.zeros(1, dtype=torch.int16)) == "16bit"
    assert masters_of(torch.zeros(1, dtype=torch.int8)) == "8bit"
    with pytest.raises(ValueError, match=r"a 'fp32' master has no correction"):
        correction_dtype("fp32")


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    master = torch.randn(shape)
    weight, correction = split(master, torch.bfloat16, "16bit")
    assert weight.shape == correction.shape == master.shape
    assert_equal(joined(weight, correction), master)
    across = master.mT if master.dim() == 2 else master
    weight, correction = split(across, torch.bfloat16, "16bit")
    assert_equal(joined(weight, correction), across, "strided")
