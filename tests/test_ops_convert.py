"""Our pass between fp32 and the 16-bit dtypes: the values of torch's own, for every value."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_equal
from torch import Tensor, nn

from spu.ops import backends, copy_in, linear_act
from spu.ops.convert import narrowed, stacked

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
HALVES = [torch.float16, torch.bfloat16]


def values() -> Tensor:
    """Every upper half of an fp32 with lower halves around the ties of both dtypes: NaN, infinities, subnormals."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).view(torch.float32)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_converted_as_by_torch(dtype: torch.dtype) -> None:
    x = values()
    found = narrowed(x, dtype)
    assert_equal(found, x.to(dtype))
    assert_equal(found.signbit() & ~found.isnan(), x.to(dtype).signbit() & ~x.isnan())  # -0
    half = every_half(dtype)
    for other in (torch.float32, *HALVES):
        assert_equal(narrowed(half, other), half.to(other))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 4096, 70001])
def test_sizes_and_strides(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size)
    assert_equal(narrowed(x, dtype), x.to(dtype))
    assert narrowed(x, torch.float32) is x
    wide = torch.randn(70, 2 * size)
    for given in (wide[:, ::2], wide.t(), wide.double()):
        assert_equal(narrowed(given, dtype), given.to(dtype))
    parts = [torch.randn(rows, size) for rows in (3, 1, 5)]
    for group in (parts, [part.to(dtype) for part in parts], [parts[0].t().contiguous().t(), *parts[1:]]):
        assert_equal(stacked(group, dtype), torch.cat([part.to(dtype) for part in group]))
    for part, target in zip(parts, targets := [torch.empty_like(part, dtype=dtype) for part in parts], strict=True):
        version = target._version
        copy_in([part], [target])
        assert target._version > version
    assert_equal(torch.cat(targets), torch.cat(parts).to(dtype))


def test_autograd_sees_a_conversion_of_torchs_where_it_records() -> None:
    """A wide operand of an op without a gradient of its own to take: nothing is lost."""
    weight, x = nn.Parameter(torch.randn(80, 64)), torch.randn(128, 64, requires_grad=True)
    y = linear_act(x, weight, dtype=torch.bfloat16)
    y.float().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.no_grad():
        assert_equal(linear_act(x, weight, dtype=torch.bfloat16), y.detach())
