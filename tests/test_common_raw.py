"""Bytes of tensors, whatever strides they have."""

from __future__ import annotations

import pytest
import torch

from spu.common.raw import bytes_of, flat, write
from spu.distributed.step_consistency import digest

ONE = {
    "of a vector": torch.arange(1.0, 9.0)[::4][:1],
    "of a matrix": torch.arange(1.0, 9.0).view(2, 4)[:1, ::4],
    "a number": torch.tensor(1.0),
    "expanded": torch.ones(1).expand(1, 1, 1),
}


@pytest.mark.parametrize("what", ONE)
def test_one_element_has_its_bytes_whatever_its_stride(what: str) -> None:
    """contiguous() leaves it its stride, and torch views other dtypes where that is 1."""
    tensor = ONE[what]
    assert bytes_of(tensor).tolist() == torch.ones(1).view(torch.uint8).tolist()
    assert flat(tensor).shape == (1,)
    assert flat(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_more_of_them_are_in_order(dtype: torch.dtype) -> None:
    whole = torch.arange(24).view(2, 3, 4)
    for cut in (whole, whole[:, 1:], whole[..., ::2], whole.mT, whole[:0], whole[1:, 2:, 3:]):
        tensor = cut.to(dtype)
        expected = tensor.reshape(-1).clone().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        assert torch.equal(bytes_of(tensor), expected)
        assert torch.equal(flat(tensor), tensor.flatten())


def test_the_last_row_of_every_other_one_is_told() -> None:
    """A rank's rows of a batch, ``targets[rank::world]``, may be one: its first step failed."""
    targets = torch.arange(4)
    assert digest(targets[::2][:1]) == digest(targets[:1])
    assert digest(targets[::2][:1]) != digest(targets[1:2])


def test_values_are_written_once_where_elements_share_memory() -> None:
    expanded = torch.zeros(1, 3, 1).expand(2, 3, 4)
    values = torch.arange(3.0)[:, None].expand(2, 3, 4).clone()
    write(expanded, values)
    assert torch.equal(expanded, values)
    values[1, 2, 3] = 7
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) is expanded and cannot hold values that differ"):
        write(expanded, values)
    assert expanded.sum() == 2 * 4 * 3
    plain = torch.zeros(2, 3)
    write(plain, torch.ones(2, 3))
    assert plain.sum() == 6
