"""AdamW and MasterOptimizer against torch's optimizers, alone and in a whole loss-scaled step."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from backend_params import every_backend
from numeric import assert_equal
from torch import Tensor, nn

from spu import ops
from spu.ops.moments import MOMENTS
from spu.optim.adamw import AdamW, clip_coefficient
from spu.precision import GradScaler, LossScaler, MainGrads

HYPER = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
SHAPES = [(17, 33), (33,), (), (1, 1)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float()) for p in params]


def set_grads(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad_dtype = torch.float32
        param.grad = grad.clone()


def random_grads() -> list[Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


def step_all(*pairs: tuple[torch.optim.Optimizer, list[nn.Parameter]], turns: int = 1) -> None:
    """Steps of several optimizers on the same gradients."""
    for _ in range(turns):
        grads = random_grads()
        for optimizer, params in pairs:
            set_grads(params, grads)
            optimizer.step()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """What a file gives back of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_twenty_steps_in_fp32_are_torchs_bit_for_bit() -> None:
    params = parameters()
    others = twins(params)
    ours, theirs = AdamW(params, **HYPER), torch.optim.AdamW(others, **HYPER, foreach=False, fused=False)
    with ops.use_backend("reference"):
        for turn in range(20):
            for group in (*ours.param_groups, *theirs.param_groups):
                group["lr"] = 3e-3 / (1 + turn)  # a schedule
            step_all((ours, params), (theirs, others))
            for i, (a, b) in enumerate(zip(params, others)):
                assert_equal(a.detach(), b.detach(), f"step {turn}, parameter {i}")
                for key in ("exp_avg", "exp_avg_sq"):
                    assert_equal(ours.state[a][key], theirs.state[b][key], f"step {turn}, {key} {i}")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masters_follow_torch_in_fp32_and_parameters_follow_masters(backend: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    others = twins(params)
    ours, theirs = AdamW(params, **HYPER), torch.optim.AdamW(others, **HYPER, foreach=False, fused=False)
    with ops.use_backend(backend):
        step_all((ours, params), (theirs, others), turns=20)
    for i, (a, b) in enumerate(zip(params, others)):
        master = ours.state[a].get("master", a).detach()
        assert ("master" in ours.state[a]) == (dtype != torch.float32)
        if backend == "reference":
            assert_equal(master, b.detach(), f"master {i}")
        # Twenty updates of at most about 3e-3, each good to a few units in the last place, on values of order 1.
        torch.testing.assert_close(master, b.detach(), rtol=2e-6, atol=2e-6)
        assert_equal(a.detach(), master.to(dtype), f"parameter {i}")


class Amp:
    """The same step in plain torch: GradScaler, clip_grad_norm_, torch.optim.AdamW, on fp32 masters."""

    def __init__(self, params: list[nn.Parameter], **scaler: float) -> None:
        self.params = params
        self.optimizer = torch.optim.AdamW(params, **HYPER, foreach=False, fused=False)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.scaler.scale(torch.ones(1))

    def step(self, scaled_sums: list[list[Tensor]], max_norm: float | None) -> Tensor | None:
        for param, scaled in zip(self.params, scaled_sums, strict=True):
            param.grad = sum(grad.float() for grad in scaled)
        self.scaler.unscale_(self.optimizer)
        norm = None
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm, foreach=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_loss_scaled_step_is_torch_amps(backend: str, dtype: torch.dtype, max_norm: float | None) -> None:
    """Overflows injected on some steps; the gradients come from plain uses, so that both see the same 16-bit values.

    Without clipping the reference backend has torch's bits: scales are powers of two, so unscaling before or after the
    fp32 sum rounds the same. With clipping the norm is summed in another order (one fp64 sum of squares instead of
    an fp32 norm of norms), which moves the coefficient by a unit or two in the last place: values are then compared
    within a few units.
    """
    params = parameters(dtype)
    masters = twins(params)
    scaler_arguments = {"init_scale": 2.0**12, "growth_interval": 3}
    amp, scaler = Amp(masters, **scaler_arguments), LossScaler(**scaler_arguments)
    optimizer, main_grads = AdamW(params, **HYPER), MainGrads(params)
    skipped = []
    with ops.use_backend(backend):
        for turn in range(20):
            main_grads.begin_step()
            scaler.begin_step()
            scaled: list[list[Tensor]] = [[] for _ in params]
            for microbatch in range(2):
                grads = random_grads()
                if turn in (2, 3, 9) and microbatch == turn % 2:
                    grads[turn % len(grads)].view(-1)[0] = float("inf")
                # The loss is a dot product with given values: each gradient is scale * value, rounded to dtype.
                loss = sum((p.float() * g).sum() for p, g in zip(params, grads))
                for store, grad in zip(scaled, grads, strict=True):
                    store.append((grad * scaler.get_scale()).to(dtype))
                scaler.scale(loss).backward()
            found_inf, coefficient = scaler.found_inf(), None
            if max_norm is not None:
                square = ops.grad_sqnorm(p.grad for p in params)
                coefficient = clip_coefficient(square, max_norm)
            optimizer.step(found_inf=found_inf, grad_scale=coefficient)
            scaler.update()
            norm = amp.step(scaled, max_norm)
            skipped.append(bool(found_inf.item()))
            if norm is not None and not skipped[-1]:
                torch.testing.assert_close(square.sqrt()[0].float(), norm, rtol=1e-6, atol=0)
            assert scaler.state_dict() == amp.scaler.state_dict(), f"step {turn}"
            for i, (param, master) in enumerate(zip(params, masters)):
                ours = optimizer.state[param].get("master", param).detach()
                name = f"step {turn}, parameter {i}"
                if backend == "reference" and max_norm is None:
                    assert_equal(ours, master.detach(), name)
                torch.testing.assert_close(
                    ours, master.detach(), rtol=3e-6, atol=3e-6, msg=lambda t, n=name: f"{n}: {t}"
                )
                assert_equal(param.detach(), ours.to(dtype), name)
    assert [i for i, s in enumerate(skipped) if s] == [2, 3, 9]
    assert {int(optimizer.state[p]["step"].item()) for p in params} == {17}


def test_clip_coefficient_is_torchs_formula() -> None:
    for norm in (0.0, 0.3, 1.0, 7.0, 1e6):
        gradient = nn.Parameter(torch.zeros(1))
        gradient.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([gradient], 1.0)
        coefficient = clip_coefficient(torch.tensor([norm]).square(), 1.0)
        assert coefficient.shape == (1,)
        torch.testing.assert_close(torch.tensor([norm]) * coefficient, gradient.grad, rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match=r"max_norm must be positive, got 0"):
        clip_coefficient(torch.ones(1), 0)


def test_parameters_without_a_gradient_are_skipped() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params)
    set_grads(params[:1], random_grads()[:1])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:]))
    assert set(optimizer.state) == {params[0]}


@pytest.mark.parametrize(("moments", "eps"), [*((moments, 1e-8) for moments in MOMENTS), ("fp32", 1e-12)])
def test_moments_without_a_gradient_end_at_zero(moments: str, eps: float) -> None:
    """And not as denormal values for ever, for which a CPU takes twenty times as long (a vocabulary's rare tokens)."""
    pytest.importorskip("spu._C")
    ours, hyper = nn.Parameter(torch.randn(3, 64)), {"lr": 1e-3, "betas": (0.9, 0.8), "eps": eps, "weight_decay": 0.0}
    plain = nn.Parameter(ours.detach().clone())
    optimizers = AdamW([ours], moments=moments, **hyper), torch.optim.AdamW([plain], **hyper)
    grad = torch.randn(3, 64)
    with ops.use_backend("cpu"):
        for step in range(1200):
            for param, optimizer in zip((ours, plain), optimizers, strict=True):
                param.grad = grad.clone() if step < 2 else torch.zeros_like(grad)
                optimizer.step()
    mine, theirs = optimizers[0].state[ours], optimizers[1].state[plain]
    for name in ("exp_avg", "exp_avg_sq"):
        assert bool((theirs[name] != 0).all())  # torch's stay (findings/adamw_denormal_moments.sh)
        assert bool((mine[name] == 0).all()) == (eps == 1e-8), name  # below an eps of 2^-32 nothing is left out
    if moments == "fp32":
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_narrow_moments_train_as_well_as_fp32_ones() -> None:
    """A small classifier: after 120 steps the loss is within 3% of that with fp32 moments.

    Without stochastic rounding the second moment would stand still at beta2 = 0.999.
    """
    losses = {}
    for moments in MOMENTS:
        torch.manual_seed(0)
        x = torch.randn(256, 32)
        y = (x @ torch.randn(32, 8)).argmax(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        optimizer = AdamW(model.parameters(), lr=5e-3, weight_decay=0.01, moments=moments)
        for _ in range(120):
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses[moments] = loss.item()
    assert losses["fp32"] < 0.25
    for moments in ("bf16", "int8"):
        assert losses[moments] == pytest.approx(losses["fp32"], rel=0.03), losses


def test_triton_is_not_asked_for_narrow_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    from spu.ops import optimizer as module

    param, moment = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "choose_backend", lambda *_, **__: "triton")
    assert module._adamw_backend(param, None, param) == "triton"
    for available, expected in ((True, "cuda"), (False, "reference")):
        status = ops.BackendStatus("cuda", available, "it is not built", "build it")
        monkeypatch.setattr(module, "status_of", lambda name, status=status: status)
        module._warn_of_reference.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert module._adamw_backend(param, None, moment) == expected
        assert ["it is not built" in str(one.message) for one in told] == [True] * (not available)
    monkeypatch.setattr(module, "forced_backend", lambda: "triton")
    with pytest.raises(ValueError, match="'triton' was forced but has fp32 moments only, these are bf16"):
        module._adamw_backend(param, None, moment)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_of_gpus_are_not_asked_for_corrections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spu.ops import optimizer as module

    param, moment = torch.zeros(3).half(), torch.zeros(3)
    correction = torch.zeros(3, dtype=torch.int16)
    monkeypatch.setattr(module, "choose_backend", lambda *_, **__: name)
    module._warn_of_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="16-bit or 8-bit masters runs in plain torch here"):
        assert module._adamw_backend(param, correction, moment) == "reference"
    assert module._adamw_backend(param, moment, moment) == name
    monkeypatch.setattr(module, "forced_backend", lambda: name)
    with pytest.raises(ValueError, match=f"'{name}' was forced but has fp32 masters only, these are 16bit: force 'ref"):
        module._adamw_backend(param, correction, moment)


@pytest.mark.parametrize(("scaler_class", "fused"), [(GradScaler, None), (torch.amp.GradScaler, True)])
def test_an_optimizer_without_gradients_does_nothing(scaler_class: type, fused: bool | None) -> None:
    """One of two networks was not used in this step. (Torch's scaler leaves the step to fused optimizers alone.)"""
    params, scaler = parameters(), scaler_class("cpu")
    before, optimizer = copy.deepcopy(params), AdamW(params, fused=fused)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    for a, b in zip(params, before):
        assert_equal(a.detach(), b.detach())
    assert not optimizer.state
    with pytest.raises(TypeError, match="found_inf must be a tensor"):
        optimizer.step(found_inf=1.0)


@every_backend
def test_a_step_is_seen_by_the_version_counter(backend: str) -> None:
    param = nn.Parameter(torch.randn(5).half())
    optimizer = AdamW([param])
    set_grads([param], [torch.ones(5)])
    square = param * param  # keeps the parameter's value for its backward
    with ops.use_backend(backend):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_reach_step_numbers(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(5))
    optimizer = AdamW([param])
    set_grads([param], [torch.ones(5)])
    torch.set_default_dtype(dtype)
    try:
        optimizer.step()
        assert ops.grad_sqnorm([]).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[param]["step"].dtype == torch.float32


def test_a_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])

    def closure() -> Tensor:
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert param.grad is not None


def test_wrong_arguments_are_named() -> None:
    param = nn.Parameter(torch.ones(3).half())
    param.grad = torch.ones(3).half()
    expected = r"torch.float16 parameter of shape \(3,\) has a torch.float16 gradient.*loss with spu.GradScaler"
    with pytest.raises(TypeError, match=expected):
        AdamW([param]).step()
    with pytest.raises(TypeError, match=r"found_inf must be float32 of one element, got torch.bool"):
        AdamW([param]).step(found_inf=torch.zeros(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -1"):
        AdamW([param], lr=-1)
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0"):
        AdamW([param], betas=(0.9, 1.0))
