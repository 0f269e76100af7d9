"""The comparisons that the kernels' tests rest on."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth, tensor_core_limit


def toward_zero(value: torch.Tensor) -> torch.Tensor:
    """fp64 values cut off to fp32."""
    near = value.float()
    return torch.where(near.double().abs() > value.abs(), torch.nextafter(near, torch.zeros_like(near)), near)


def test_the_limit_of_tensor_cores_holds_sums_that_are_cut_off_and_no_lost_terms() -> None:
    a, b = torch.randn(24, 2048).half(), torch.randn(2048, 24).half()
    wide, truth = (a.double(), b.double()), a.double() @ b.double()
    total = torch.zeros(24, 24)
    for k in range(0, 2048, 16):
        total = toward_zero(total.double() + wide[0][:, k : k + 16] @ wide[1][k : k + 16])
    limit = tensor_core_limit(a, b)
    assert_close_to_truth(total, truth.float(), truth, limit=limit)
    assert float(((total.double() - truth).abs() / limit).max()) > 1e-3, "a limit that everything keeps is none"
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_truth((wide[0][:, 1:] @ wide[1][1:]).float(), truth.float(), truth, limit=limit)
