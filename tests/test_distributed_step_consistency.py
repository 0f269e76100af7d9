"""The number that stands for a batch, and what the processes say where theirs differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spu.distributed.step_consistency import BATCH, FACTOR, RATES, check_told, digest, rates_digest


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=70), st.data())
def test_one_value_or_two_in_each_others_place_make_another_number(values: list[int], data: st.DataObject) -> None:
    batch = torch.tensor(values)
    index, other = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    changed = batch.clone()
    changed[index] += 1
    assert digest(changed) != digest(batch) == digest(batch.clone())
    swapped = batch.clone()
    swapped[[index, other]] = batch[[other, index]]
    assert (digest(swapped) == digest(batch)) == bool(batch[index] == batch[other])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2)])
def test_every_form_of_a_tensor_has_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = digest({"a": torch.zeros(shape).to(dtype), "b": "text"})
    assert made.dtype == torch.float64
    assert made == made.trunc()
    assert abs(made) < 2**52
    assert made != digest({"a": torch.zeros(shape).to(dtype), "b": "other"})
    assert made != digest({"a": torch.zeros((*shape, 1)).to(dtype), "b": "text"})


def test_layouts_are_the_values_alone_and_large_tensors_are_read_in_every_row() -> None:
    ids = torch.arange(60).view(5, 12)
    assert digest(ids[:, 1:]) == digest(ids[:, 1:].contiguous())
    assert digest(ids.t()) == digest(ids.t().contiguous()) != digest(ids)
    assert digest(ids.to_sparse()) == digest(ids)
    large = torch.zeros(3, 2**20)
    rows = [large.clone().index_fill_(0, torch.tensor([row]), 1.0) for row in range(3)]
    assert len({float(digest(each)) for each in (large, *rows)}) == 4
    assert digest(torch.zeros(2**21)) != digest(torch.ones(2**21))


def test_settings_of_optimizers_are_numbers_and_tensors_of_one() -> None:
    group: dict[str, Any] = {"params": [torch.ones(1)], "lr": 0.1, "betas": (0.9, 0.99), "hook": print}
    assert rates_digest([group]) == rates_digest([group | {"params": [torch.ones(2)], "hook": repr}])
    assert rates_digest([group]) != rates_digest([group | {"lr": 0.2}])
    assert rates_digest([group]) != rates_digest([group | {"betas": (0.9, 0.98)}])
    assert rates_digest([group | {"lr": torch.tensor(0.1)}]) != rates_digest([group | {"lr": torch.tensor(0.2)}])


def test_optimizers_are_compared_at_one_place_and_the_rest_everywhere() -> None:
    told = [{BATCH: 1.0, FACTOR: 0.5, RATES: rates} for rates in (1.0, 2.0, 1.0, 2.0)]
    check_told(told, [0, 1, 0, 1], {})
    with pytest.raises(ValueError, match=r"rank 3 has another setting of an optimizer \(lr, betas, ...\) than rank 1"):
        check_told([*told[:3], told[3] | {RATES: 3.0}], [0, 1, 0, 1], {})
    with pytest.raises(ValueError, match=r"rank 2 has another batch than rank 0 in this step; .* the same one, help"):
        check_told([*told[:2], told[2] | {BATCH: 3.0}, told[3]], [0, 1, 0, 1], {BATCH: "help"})
