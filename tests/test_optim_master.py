"""MasterOptimizer: any optimizer of torch, on fp32 masters."""

from __future__ import annotations

import copy

import pytest
import torch
from numeric import assert_equal
from test_optim import SHAPES, parameters, random_grads, set_grads, step_all, twins
from torch import Tensor

from spu.optim.adamw import MasterOptimizer


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_master_optimizer_runs_any_optimizer_in_fp32(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    others = twins(params)
    ours, theirs = MasterOptimizer(sgd, params), sgd(others)
    for turn in range(6):
        grads = random_grads()
        set_grads(params, grads)
        ours.step(found_inf=torch.tensor([float(turn == 3)]), grad_scale=torch.tensor([0.5]))
        if turn != 3:
            set_grads(others, [g * 0.5 for g in grads])
            theirs.step()
        for i, (a, b) in enumerate(zip(params, others)):
            assert_equal(a.detach(), b.detach().to(dtype), f"step {turn}, parameter {i}")
    assert [m is None for m in ours.masters()] == [dtype == torch.float32] * len(params)
    for param_group in ours.param_groups:
        param_group["lr"] = 0.0
    before = copy.deepcopy([p.detach() for p in params])
    set_grads(params, random_grads())
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before))


def test_master_optimizer_state_continues_bit_for_bit() -> None:
    params = parameters(torch.float16)
    masters = [torch.randn(shape) for shape in SHAPES]
    optimizer = MasterOptimizer(sgd, params, masters)
    set_grads(params, random_grads())
    optimizer.step()
    others = parameters(torch.float16)
    loaded = MasterOptimizer(sgd, others)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_all((optimizer, params), (loaded, others), turns=2)
    for a, b in zip([*params, *optimizer.masters()], [*others, *loaded.masters()]):
        assert_equal(b.detach(), a.detach())
    with pytest.raises(ValueError, match=r"1 masters for 4 parameters"):
        MasterOptimizer(sgd, params, masters[:1])
    with pytest.raises(ValueError, match=r"state has 4 masters, this optimizer 1 parameters"):
        MasterOptimizer(sgd, params[:1]).load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


class Counting(torch.optim.Optimizer):
    """Keeps state that fp32 cannot hold."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state["count"] = torch.tensor(2**24)
                state["codes"] = torch.arange(param.numel(), dtype=torch.uint8).view(param.shape)
                state["sum"] = torch.full(param.shape, 1 / 3, dtype=torch.float64)
                state["narrow"] = torch.ones(param.shape, dtype=torch.bfloat16)
            state["count"] += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_that_fp32_cannot_hold_is_loaded_as_it_was_saved(dtype: torch.dtype) -> None:
    """torch casts state to fp32: a count of 2^24 + 1 lost its last bit (findings/optimizer_load_narrows_state.sh)."""

    def make() -> tuple[torch.nn.Parameter, MasterOptimizer]:
        param = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
        param.grad_dtype = torch.float32
        param.grad = torch.ones(3, 4)
        return param, MasterOptimizer(lambda p: Counting(p, {}), [param])

    _, optimizer = make()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    _, loaded = make()
    loaded.load_state_dict(state)
    (saved,), (found,) = optimizer.optimizer.state.values(), loaded.optimizer.state.values()
    for key in ("count", "codes", "sum"):
        assert_equal(found[key], saved[key], key)
    assert saved["count"] == 2**24 + 1
    assert found["narrow"].dtype == torch.float32


def test_steps_after_a_load_leave_the_loaded_state_alone() -> None:
    """torch takes a state's tensors as its own: a second start from it had the first run's last moments.

    See findings/optimizer_load_takes_tensors.sh.
    """
    params = parameters(torch.float32)
    optimizer = MasterOptimizer(sgd, params)
    set_grads(params, random_grads())
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state["optimizer"]["state"])
    loaded = MasterOptimizer(sgd, params)
    loaded.load_state_dict(state)
    set_grads(params, random_grads())
    loaded.step()
    for index, saved in before.items():
        assert_equal(state["optimizer"]["state"][index]["momentum_buffer"], saved["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_optimizers_find_each_weights_gradient_and_state(dtype: torch.dtype) -> None:
    """Weights that were not contiguous were updated with other weights' gradients, and after a load with their moments.

    torch's fused optimizers on CPUs do not compare strides.
    """

    def make(strided: bool) -> tuple[torch.nn.Parameter, MasterOptimizer]:
        value = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        param = torch.nn.Parameter(value.t().contiguous().t() if strided else value)
        param.grad_dtype = torch.float32
        return param, MasterOptimizer(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), [param])

    def steps(param: torch.nn.Parameter, optimizer: MasterOptimizer) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            param.grad = torch.randn(5, 7, generator=generator)
            optimizer.step()

    (plain, first), (strided, second) = make(False), make(True)
    steps(plain, first)
    steps(strided, second)
    assert_equal(strided.detach(), plain.detach())
    again, third = make(True)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    if dtype == torch.float32:
        again.data.copy_(plain.detach())
    steps(plain, first)
    steps(again, third)
    assert_equal(again.detach(), plain.detach())
