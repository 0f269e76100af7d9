"""The nodes of fused ops: tensors that a transform has left behind, and backwards that are asked for some results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spu
from spu.ops.sink import BackwardScope, open_scope
from spu.precision.main_grads import MainGrads


def fused() -> nn.Module:
    torch.manual_seed(0)
    return spu.accelerate(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))


def test_a_tensor_that_has_left_a_transform_is_a_plain_one_again() -> None:
    left: list[Tensor] = []

    def keeping(x: Tensor) -> Tensor:
        left.append((x * 2).detach())
        return x.sum()

    x = torch.randn(4, 8)
    torch.func.grad(keeping)(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    found = []
    for given in (left[0], x * 2):
        ours = fused()
        y = ours(given)
        y.square().sum().backward()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(y)
        found.append([y, *(p.grad for p in ours.parameters() if p.grad is not None)])
    assert len(found[0]) == 6
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("whole", [False, True])
def test_a_scope_of_a_whole_backward_gives_the_same_main_gradients(whole: bool) -> None:
    ours = fused()
    grads = MainGrads(list(ours.parameters()))
    grads.begin_step()
    one = torch.ones(1)
    scope = BackwardScope(one, one.clone(), torch.zeros(1), whole=whole)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    open_scope(ours(x).square().sum(), scope).backward()
    other = fused()
    other(x).square().sum().backward()
    for mine, expected in zip(ours.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(mine.grad, expected.grad)


def test_a_scope_that_is_not_leaves_gradients_that_were_asked_for_to_who_asks() -> None:
    ours = fused()
    grads = MainGrads(list(ours.parameters()))
    grads.begin_step()
    one = torch.ones(1)
    scope = BackwardScope(one, one.clone(), torch.zeros(1))
    loss = open_scope(ours(torch.randn(4, 8)).square().sum(), scope)
    first, *others = ours.parameters()
    (gradient,) = torch.autograd.grad(loss, [first])
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in (first, *others))
