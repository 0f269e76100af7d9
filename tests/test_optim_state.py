"""What AdamW saves, loads and converts: states of its own, of torch's, of other settings, narrow moments."""

from __future__ import annotations

import copy

import pytest
import torch
from backend_params import every_backend
from numeric import assert_equal
from test_optim import HYPER, parameters, random_grads, saved, set_grads, step_all, twins
from torch import nn

from spu import ops
from spu.optim.adamw import AdamW


def test_set_master_gives_the_exact_start() -> None:
    exact = torch.randn(5)
    param = nn.Parameter(exact.half())
    optimizer = AdamW([param], lr=0.0)
    optimizer.set_master(param, exact)
    set_grads([param], [torch.ones(5)])
    optimizer.step()
    assert_equal(optimizer.state[param]["master"], exact, "master")
    with pytest.raises(ValueError, match=r"master has shape \(4,\), its parameter \(5,\)"):
        optimizer.set_master(param, torch.zeros(4))
    with pytest.raises(TypeError, match=r"torch.float32 parameter has no master"):
        optimizer.set_master(nn.Parameter(torch.zeros(5)), torch.zeros(5))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_saved_state_continues_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], **HYPER)
    with ops.use_backend(backend):
        step_all((optimizer, params), turns=3)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        loaded = AdamW([{"params": others[:2]}, {"params": others[2:]}])
        loaded.load_state_dict(saved(optimizer.state_dict()))
        for a, b in zip(params, others):
            assert set(optimizer.state[a]) == set(loaded.state[b])
            for key, value in optimizer.state[a].items():
                assert_equal(loaded.state[b][key], value, key)
                assert loaded.state[b][key].data_ptr() != value.data_ptr()
        step_all((optimizer, params), (loaded, others), turns=3)
    for i, (a, b) in enumerate(zip(params, others)):
        assert_equal(b.detach(), a.detach(), f"parameter {i}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_narrow_moments_are_saved_and_converted(moments: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params, **HYPER, moments=moments)
    step_all((optimizer, params), turns=3)
    state = saved(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    same, wide = AdamW(others, **HYPER, moments=moments), AdamW(twins(params), **HYPER)
    same.load_state_dict(state)
    wide.load_state_dict(state)
    back = AdamW(twins(params), **HYPER, moments=moments)
    back.load_state_dict(wide.state_dict())
    wide_params, back_params = ([p for g in o.param_groups for p in g["params"]] for o in (wide, back))
    for a, b, c, d in zip(params, others, wide_params, back_params):
        for key in ("exp_avg", "exp_avg_sq"):
            kept = optimizer.state[a][key]
            assert_equal(same.state[b][key], kept, key)
            assert wide.state[c][key].dtype == torch.float32
            assert wide.state[c][key].shape == a.shape
            assert_equal(back.state[d][key], kept, f"{key}, there and back")
    step_all((optimizer, params), (same, others), turns=2)
    for a, b in zip(params, others):
        assert_equal(b.detach(), a.detach(), "goes on bit for bit")


def test_moments_put_into_the_state_by_a_checkpoint_are_converted_at_the_next_step() -> None:
    param = nn.Parameter(torch.randn(100))
    optimizer = AdamW([param], moments="int8")
    given = {"step": torch.ones(1), "exp_avg": torch.randn(100), "exp_avg_sq": torch.rand(100)}
    optimizer.state[param].update(given)
    set_grads([param], [torch.randn(100)])
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    optimizer.state[param]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"state's exp_avg is torch.float32 \(7,\)"):
        optimizer.step()


def test_a_copied_optimizer_steps_on() -> None:
    param = nn.Parameter(torch.randn(5))
    optimizer = AdamW([param], moments="bf16")
    set_grads([param], [torch.ones(5)])
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    (other,) = copied.param_groups[0]["params"]
    set_grads([other], [torch.ones(5)])
    copied.step()
    optimizer.step()
    assert_equal(other.detach(), param.detach())
    assert copied.moments == "bf16"


@pytest.mark.parametrize("setting", [{"maximize": True}, {"amsgrad": True}])
def test_a_state_of_another_update_is_refused(setting: dict[str, bool]) -> None:
    param = nn.Parameter(torch.randn(5))
    with pytest.raises(ValueError, match=f"saved with {next(iter(setting))}=True"):
        AdamW([param]).load_state_dict(torch.optim.AdamW([param], **setting).state_dict())
    with pytest.raises(ValueError, match="not decoupled"):
        AdamW([param]).load_state_dict(torch.optim.Adam([param]).state_dict())


def test_torchs_state_of_16_bit_parameters_gets_masters() -> None:
    param, wide = nn.Parameter(torch.randn(5).half()), nn.Parameter(torch.randn(5))
    theirs = torch.optim.AdamW([wide])
    wide.grad = torch.ones(5)
    theirs.step()
    ours = AdamW([param])
    ours.load_state_dict(theirs.state_dict())
    set_grads([param], [torch.ones(5)])
    ours.step()
    assert ours.state[param]["master"].dtype == torch.float32


def test_torchs_adamw_state_can_be_loaded() -> None:
    params = parameters()
    others = twins(params)
    theirs, ours = torch.optim.AdamW(others, **HYPER, foreach=False), AdamW(params, **HYPER)
    with ops.use_backend("reference"):
        for turn in range(4):
            grads = random_grads()
            set_grads(params, grads)
            set_grads(others, grads)
            theirs.step()
            if turn == 1:
                ours.load_state_dict(theirs.state_dict())
                for a, b in zip(params, others):
                    a.data.copy_(b)
            elif turn > 1:
                ours.step()
    for a, b in zip(params, others):
        assert_equal(a.detach(), b.detach())
