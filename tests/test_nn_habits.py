"""What scripts do around accelerated models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spu


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_what_a_script_has_set_for_its_own_tensors_reaches_no_op(dtype: torch.dtype, precision: str | None) -> None:
    def trained() -> dict[str, Tensor]:
        for _ in range(2):  # the second adds to gradients that are there
            model(ids).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return gradients

    torch.manual_seed(0)
    layers = [nn.Embedding(9, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)]
    model, ids = spu.accelerate(nn.Sequential(*layers), precision), torch.arange(27).view(3, 9) % 9
    expected = trained()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("learns", [False, True])
def test_ids_that_are_no_integers_are_refused_as_torch_refuses_them(learns: bool) -> None:
    table = spu.accelerate(nn.Embedding(4, 4)).requires_grad_(learns)
    for ids in (torch.tensor([1.7]), torch.tensor([True]), torch.tensor([1], dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="indices"):
            table(ids)
