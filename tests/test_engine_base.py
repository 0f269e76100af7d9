"""Checkpoints of adapters are loaded beside the weights that they were trained on, and beside no others."""

from __future__ import annotations

import pytest
import torch

from spu.checkpoint.writing import CheckpointError
from spu.engine.base import base_record, check_base, sampled


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = {"a": torch.randn(7, 33, generator=generator).T, "b": torch.randn(5, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in {**whole, "empty": torch.zeros(0, 3)}.items()}


def test_the_same_weights_pass_in_any_order_and_none_are_asked_for_where_none_were_saved() -> None:
    record = base_record(sampled(weights()))
    check_base(record, sampled(dict(reversed(weights().items()))))
    check_base(record, sampled({name: tensor.contiguous() for name, tensor in weights().items()}))
    check_base(None, {})


def test_other_weights_are_refused() -> None:
    record, changed = base_record(sampled(weights())), weights()
    changed["b"][0] += 1
    with pytest.raises(
        CheckpointError, match="not those that the checkpoint's adapters were trained on: load the same"
    ):
        check_base(record, sampled(changed))
    with pytest.raises(CheckpointError, match="trained beside 3 frozen tensors, and this one has 2"):
        check_base(record, sampled({name: tensor for name, tensor in weights().items() if name != "b"}))
    with pytest.raises(CheckpointError, match="of another model"):
        check_base(record, sampled(weights() | {"b": torch.zeros(6)}))


def test_another_precision_is_compared_by_names_and_shapes() -> None:
    check_base(base_record(sampled(weights())), sampled(weights(torch.bfloat16)))
