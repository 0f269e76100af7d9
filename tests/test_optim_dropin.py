"""spu.optim.AdamW where torch.optim.AdamW stood: keywords, groups, states, hooks, schedulers, kinds of parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_equal
from torch import Tensor, nn
from torch.optim import lr_scheduler

from spu.optim.adamw import AdamW, MasterOptimizer
from spu.precision import GradScaler

pytestmark = pytest.mark.usefixtures("reference")  # bit-equal to torch

HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
Pair = tuple[list[nn.Parameter], list[nn.Parameter], AdamW, torch.optim.AdamW]


def values(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All the forms that parameters have."""
    image = torch.randn(2, 3, 4, 5, dtype=dtype)
    return [
        torch.randn(7, 5, dtype=dtype),
        torch.randn((), dtype=dtype),
        torch.randn(0, 3, dtype=dtype),
        image.to(memory_format=torch.channels_last),
        torch.randn(6, 4, dtype=dtype).t(),
        torch.randn(10, 4, dtype=dtype)[::2, 1:3],
    ]


def pair(settings: dict[str, Any] = HYPER, dtype: torch.dtype = torch.float32) -> Pair:
    given = values(dtype)
    ours, theirs = ([nn.Parameter(v.detach().clone()) for v in given] for _ in "ab")
    return ours, theirs, AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings, foreach=False)


def set_grads(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = torch.randn_like(a)
        if i == 0:
            grad = grad[:1, :1].expand(a.shape)  # its elements share memory
        elif a.dim() == 2:
            grad = torch.randn(a.shape[::-1], dtype=a.dtype).t()
        a.grad, b.grad = grad, grad.clone()


def run(ours: list[nn.Parameter], theirs: list[nn.Parameter], mine: Any, other: Any, steps: int = 3) -> None:
    for turn in range(steps):
        set_grads(ours, theirs)
        mine.step()
        other.step()
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a.detach(), b.detach(), f"step {turn}, parameter {i}")
            for key in ("exp_avg", "exp_avg_sq"):
                assert_equal(mine.state[a][key], other.state[b][key], f"step {turn}, {key} {i}")
            assert mine.state[a]["step"].item() == other.state[b]["step"].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_every_form_of_parameter_is_stepped_as_by_torch(dtype: torch.dtype) -> None:
    run(*pair(dtype=dtype))


def test_fp64_and_complex_parameters_stand_beside_others_and_skip_with_them() -> None:
    kinds = [torch.float64, torch.float32, torch.complex64]
    params = [nn.Parameter(torch.randn(5, dtype=kind)) for kind in kinds]
    optimizer = AdamW(params, lr=0.1, moments="int8")
    for found in (1.0, 0.0):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(found_inf=torch.tensor([found]), grad_scale=torch.tensor([0.5]))
        assert [torch.equal(a, b) for a, b in zip(params, before)] == [found == 1.0] * 3
    assert {p: optimizer.state[p]["exp_avg"].dtype for p in params} == dict(
        zip(params, (torch.float64, torch.uint8, torch.complex64))
    )
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = AdamW(others, lr=0.1, moments="int8")
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    loaded.step()
    for p, q in zip(params, others):
        assert_equal(p.detach(), q.detach())


def test_a_gradient_that_does_not_fit_its_parameter_is_named() -> None:
    param = nn.Parameter(torch.randn(3, dtype=torch.float64))
    param.grad_dtype = torch.float32
    param.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"float64 parameter of shape \(3,\) has a torch.float32 gradient.*own dtype"):
        AdamW([param]).step()
    narrow = nn.Parameter(torch.ones(3).to(torch.float8_e5m2))
    narrow.grad_dtype = torch.float32
    narrow.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"is torch.float8_e5m2: optimizers here step float16"):
        AdamW([narrow]).step()


def test_values_of_another_kind_are_named() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="lr is '1e-3': give a number"):
        AdamW(params, lr="1e-3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"betas is 0.9: give two numbers, such as \(0.9, 0.999\)"):
        AdamW(params, betas=0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"betas\[1\] is None: give a number"):
        AdamW(params, betas=(0.9, None))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factory is a SGD: give what makes an optimizer"):
        MasterOptimizer(torch.optim.SGD(params, lr=0.1), params)  # type: ignore[arg-type]
    optimizer = AdamW(params)
    for state, has in (({}, "it is empty"), ({"weight": torch.ones(1)}, "weight")):
        with pytest.raises(ValueError, match=rf"no optimizer's state \({has}\): give what its state_dict\(\) returned"):
            optimizer.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state has no betas, eps: it is another optimizer's than AdamW's"):
        optimizer.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


DEFAULTS = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}


@pytest.mark.parametrize("more", [{}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}])
def test_torchs_keywords_are_taken_where_they_change_nothing(more: dict[str, bool]) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], 0.1, (0.9, 0.999), 1e-8, 0.01, **DEFAULTS | more)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **DEFAULTS})
    assert AdamW([param], 0.1, (0.9, 0.999), 1e-8, 0.01, False).defaults["lr"] == 0.1


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_torchs_keywords_that_mean_another_update_are_refused_by_name(name: str) -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{name}=True is not in spu.optim.AdamW: use torch.optim.AdamW"):
        AdamW([param], **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True is not in"):
        AdamW([{"params": [param], name: True}])
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"{name}=True is not in"):
        optimizer.step()
    assert not optimizer.state


def test_learning_rates_that_are_tensors() -> None:
    with pytest.raises(ValueError, match=r"lr must be a number or a tensor of one element, got one of shape \(2,\)"):
        AdamW([nn.Parameter(torch.ones(3))], lr=torch.ones(2))
    for lr in (torch.tensor(0.1), torch.tensor([0.1])):
        ours, theirs, mine, other = pair(HYPER | {"lr": lr})
        assert mine.param_groups[0]["lr"] is lr
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 0.05
        run(ours, theirs, mine, other)
    betas = AdamW(values()[:1], betas=(torch.tensor(0.5), torch.tensor([0.75]))).param_groups[0]["betas"]
    assert betas == (0.5, 0.75)
    scheduled = AdamW([nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1))
    lr_scheduler.LambdaLR(scheduled, lambda _: 0.5)
    assert scheduled.param_groups[0]["lr"].item() == pytest.approx(0.05)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=True),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_drive_it(name: str) -> None:
    ours, theirs, mine, other = pair()
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (mine, other)]
    for turn in range(5):
        run(ours, theirs, mine, other, 1)
        for scheduler in schedulers:
            scheduler.step(*([1.0 + turn] if name == "plateau" else []))
        assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        assert mine.param_groups[0]["betas"] == other.param_groups[0]["betas"]


def test_groups_are_added_named_and_edited() -> None:
    ours, theirs, *_ = pair()
    optimizers = []
    for cls, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        named = ((str(i), p) for i, p in enumerate(params[:2]))  # a generator of (name, parameter)
        made = cls([{"params": named, "lr": 0.1}, {"params": [("2", params[2]), ("3", params[3])]}], **HYPER)
        made.add_param_group({"params": [("4", params[4]), ("5", params[5])], "betas": (0.5, 0.6), "eps": 1e-3})
        made.param_groups[1] |= {"lr": 0.2, "weight_decay": 0.5}
        optimizers.append(made)
    assert [g.get("param_names") for g in optimizers[0].param_groups] == [["0", "1"], ["2", "3"], ["4", "5"]]
    optimizers[1].param_groups[0]["foreach"] = False
    run(ours, theirs, *optimizers)
    assert "param_names" in optimizers[0].state_dict()["param_groups"][0]


def test_states_go_to_torch_and_back() -> None:
    ours, theirs, mine, other = pair()
    run(ours, theirs, mine, other)
    for other_mode in (False, True):
        mine_state, other_state = copy.deepcopy(mine.state_dict()), copy.deepcopy(other.state_dict())
        other_state["param_groups"][0]["capturable"] = other_mode  # how torch ran, not what it computed
        mine, other = AdamW(ours), torch.optim.AdamW(theirs, foreach=False)
        mine.load_state_dict(other_state)
        other.load_state_dict(mine_state)
        run(ours, theirs, mine, other)


def test_a_state_whose_step_is_a_number() -> None:
    """As torch kept it before 1.12, and converters do."""
    ours, theirs, mine, other = pair()
    run(ours, theirs, mine, other)
    state = copy.deepcopy(other.state_dict())
    for own in state["state"].values():
        own["step"] = int(own["step"])
    mine = AdamW(ours)
    mine.load_state_dict(state)
    run(ours, theirs, mine, other)
    for p in ours:  # and by hand
        mine.state[p]["step"] = int(mine.state[p]["step"])
    run(ours, theirs, mine, other)


def named_state(state: dict[str, Any], value: float) -> dict[str, Any]:
    changed = copy.deepcopy(state)
    for own in changed["state"].values():
        own["exp_avg"].fill_(value)
    return changed


def test_hooks_of_load_state_dict_are_heard() -> None:
    ours, theirs, mine, other = pair()
    run(ours, theirs, mine, other)
    state = mine.state_dict()
    seen = []
    mine.register_load_state_dict_pre_hook(lambda _, s: named_state(s, 7.0))
    mine.register_load_state_dict_pre_hook(lambda _, s: seen.append(s["state"][0]["exp_avg"].max().item()))
    mine.load_state_dict(state)
    assert seen == [7.0]
    assert all(bool((mine.state[p]["exp_avg"] == 7.0).all()) for p in ours)
    mine.register_load_state_dict_post_hook(lambda o: [o.state[p]["exp_avg"].zero_() for p in ours])
    mine.load_state_dict(state)
    assert not any(bool(mine.state[p]["exp_avg"].any()) for p in ours)
    assert len(mine._optimizer_load_state_dict_pre_hooks) == 2
    mine.register_load_state_dict_pre_hook(
        lambda _, s: s | {"param_groups": [s["param_groups"][0] | {"maximize": True}]}
    )
    with pytest.raises(ValueError, match="maximize=True"):
        mine.load_state_dict(state)
    assert mine._loading is None
    assert pickle.loads(pickle.dumps(AdamW(values()[:1]))).state == {}


def test_a_pre_hook_matches_states_by_name() -> None:
    """torch's documented use: the parameters have changed places since the state was saved."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    saved = AdamW([("a", a), ("b", b)])
    a.grad, b.grad = torch.full((2,), 1.0), torch.full((2,), 3.0)
    saved.step()
    loaded = AdamW([("b", b), ("a", a)])

    def by_name(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        found = dict(zip(state["param_groups"][0]["param_names"], state["state"].values()))
        names = optimizer.param_groups[0]["param_names"]
        return {**state, "state": {i: found[name] for i, name in enumerate(names)}}

    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for p in (a, b):
        assert_equal(loaded.state[p]["exp_avg"], saved.state[p]["exp_avg"])


def test_step_hooks_and_zero_grad() -> None:
    param, heard = nn.Parameter(torch.ones(3)), []
    optimizer = AdamW([param])
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    param.grad = torch.ones(3)
    optimizer.step()
    assert heard == ["before", "after"]
    optimizer.zero_grad(set_to_none=False)
    assert_equal(param.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert param.grad is None
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 1


def sparse(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    dense, table = nn.Parameter(torch.ones(3).to(dtype)), nn.Parameter(torch.ones(4, 2).to(dtype))
    for p in (dense, table):
        p.grad_dtype = torch.float32
    dense.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2))
    return dense, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sparse_gradient_is_named_before_anything_moves(dtype: torch.dtype) -> None:
    dense, table = sparse(dtype)
    optimizer = AdamW([{"params": [dense]}, {"params": [table]}])
    with pytest.raises(TypeError, match=r"shape \(4, 2\) has a sparse gradient.*SparseAdam"):
        optimizer.step()
    assert not optimizer.state
    assert_equal(dense.detach(), torch.ones(3).to(dtype))
    dense.grad *= 1  # a step later
    table.grad = None
    optimizer.step()
    before = dense.detach().clone()
    table.grad = sparse()[1].grad
    with pytest.raises(TypeError, match="sparse gradient"):
        optimizer.step()
    assert_equal(dense.detach(), before)
    assert optimizer.state[dense]["step"].item() == 1


def test_a_sparse_gradient_through_the_scaler_and_in_a_master_optimizer() -> None:
    dense, table = sparse()
    optimizer, scaler = AdamW([{"params": [dense]}, {"params": [table]}]), GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(TypeError, match="sparse gradient"):
        scaler.step(optimizer)
    assert not optimizer.state
    dense, table = sparse(torch.float16)
    masters = MasterOptimizer(lambda p: torch.optim.SGD(p, lr=1.0), [dense, table])
    with pytest.raises(TypeError, match="sparse gradient"):
        masters.step(grad_scale=torch.tensor([0.5]))
    assert_equal(dense.grad, torch.ones(3))
    assert_equal(masters.master(dense), torch.ones(3))


@pytest.mark.parametrize("master", [False, True], ids=["AdamW", "MasterOptimizer"])
def test_bf16_gradients_of_bf16_parameters_are_taken(master: bool) -> None:
    """A loop without a scaler gives them, and torch's optimizers take them."""
    ours = [nn.Parameter(v.bfloat16()) for v in values()]
    wide = [nn.Parameter(p.detach().float()) for p in ours]
    make = (lambda p: MasterOptimizer(lambda t: torch.optim.SGD(t, lr=0.1), p)) if master else AdamW
    optimizers = make(ours), make(wide)
    for step in range(3):
        for own, other in zip(ours, wide, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.float()
        for optimizer in optimizers:
            optimizer.step(grad_scale=torch.tensor([0.5]) if step == 1 else None)
    for own, other in zip(ours, wide, strict=True):
        assert own.grad.dtype == torch.bfloat16
        assert_equal(optimizers[0].master(own), other.detach(), "master")


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("scaler_class", [GradScaler, torch.amp.GradScaler])
def test_only_fused_tells_others_that_it_skips_by_itself(scaler_class: type, fused: bool | None) -> None:
    """Lightning clips no gradients of an optimizer with that mark; torch's have it with ``fused=True`` alone."""
    ours, torchs = nn.Linear(3, 2), nn.Linear(3, 2)
    torchs.load_state_dict(ours.state_dict())
    ends = []
    for model, make in ((ours, AdamW), (torchs, torch.optim.AdamW)):
        optimizer, scaler = make(model.parameters(), fused=fused), scaler_class("cpu", 4.0)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        if make is AdamW:
            copied = pickle.loads(pickle.dumps(optimizer))
            assert copied._step_supports_amp_scaling is optimizer._step_supports_amp_scaling is bool(fused)
        ends.append((scaler.get_scale(), *(p.detach() for p in model.parameters())))
    torch.testing.assert_close(*ends)
