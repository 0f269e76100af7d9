"""LossScaler: torch.amp.GradScaler's arithmetic on the device, and scopes that do not race."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from numeric import assert_equal
from together import together

from spu import ops
from spu.precision import LossScaler


def torch_scaler(**arguments: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", **arguments)
    scaler.scale(torch.ones(1))  # makes its tensors
    return scaler


def torch_update(scaler: torch.amp.GradScaler, found_inf: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), float("inf") if found_inf else 0.0)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(("growth", "backoff", "interval"), [(2.0, 0.5, 3), (1.7, 0.3, 1), (4.0, 0.9, 2)])
def test_updates_equal_torchs(growth: float, backoff: float, interval: int) -> None:
    arguments = {"growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval}
    ours, theirs = LossScaler(1000.0, **arguments), torch_scaler(init_scale=1000.0, **arguments)
    ours.scope()
    for i, overflow in enumerate([0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]):
        ours.begin_step()
        if overflow:
            ours.scope().found_inf.fill_(1)
        ours.update()
        torch_update(theirs, bool(overflow))
        assert ours.state_dict() == theirs.state_dict(), f"update {i}"


def test_growth_stops_before_infinity() -> None:
    ours = LossScaler(2.0**127, growth_interval=1)
    ours.scope()
    ours.update()
    assert ours.get_scale() == 2.0**127


def test_state_is_interchangeable_with_torchs_both_ways() -> None:
    ours = LossScaler(512.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5)
    ours.scope()
    ours.update()
    theirs = torch_scaler()
    theirs.load_state_dict(ours.state_dict())
    back = LossScaler()
    back.load_state_dict(theirs.state_dict())
    assert back.state_dict() == theirs.state_dict() == ours.state_dict()
    assert back.state_dict()["_growth_tracker"] == 1
    back.begin_step()
    assert back.scope().scale.item() == 512.0


def test_a_loaded_scale_reaches_existing_scopes_at_begin_step() -> None:
    scaler = LossScaler(8.0)
    scope = scaler.scope()
    tensors = scope.scale, scope.inv_scale, scope.found_inf
    scaler.load_state_dict(LossScaler(64.0).state_dict())
    scope.found_inf.fill_(1)
    scaler.begin_step()
    assert scaler.scope() is scope
    assert all(a is b for a, b in zip(tensors, (scope.scale, scope.inv_scale, scope.found_inf)))
    assert [tensor.item() for tensor in tensors] == [64.0, 1 / 64, 0.0]


def test_a_state_with_missing_entries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks scale, .*_growth_tracker.*disabled"):
        LossScaler().load_state_dict({})


def test_scale_multiplies_as_torchs_and_opens_the_scope() -> None:
    scaler, seen = LossScaler(4.0), []
    for dtype in (torch.float32, torch.float16):
        for shape in ((), (3,)):
            x = torch.ones(shape, dtype=dtype, requires_grad=True)
            y = x * 1
            y.register_hook(lambda _: seen.append(ops.current_scope()))
            scaled, theirs = scaler.scale(y), torch_scaler(init_scale=4.0).scale(y)
            assert scaled.dtype == theirs.dtype
            assert_equal(scaled.detach(), theirs.detach())
            scaled.sum().backward()
            assert_equal(x.grad, torch.full_like(x, 4.0))
    assert seen == [scaler.scope()] * 4


def test_owners_have_their_own_flags_and_found_inf_combines_them() -> None:
    scaler = LossScaler()
    first, second = scaler.scope(owner="stage 0"), scaler.scope(owner="stage 1")
    assert first is not second
    assert scaler.scope("cpu", "stage 0") is scaler.scope(torch.device("cpu:0"), "stage 0") is first
    assert scaler.found_inf().item() == 0
    second.found_inf.fill_(1)
    assert first.found_inf.item() == 0
    combined = scaler.found_inf()
    assert combined.item() == 1
    assert combined.shape == (1,)
    scaler.begin_step()
    assert scaler.found_inf().item() == 0
    assert combined.item() == 1, "an earlier answer does not change"


def test_a_scaler_stays_where_it_was_made() -> None:
    """The device "cuda" is the current one, later perhaps another: flags were gathered there, and the scale stayed."""
    scaler = LossScaler(device="cpu:1")
    assert scaler.device == scaler.found_inf().device == torch.device("cpu")


def test_scopes_may_be_asked_for_by_several_threads() -> None:
    scaler, barrier = LossScaler(), threading.Barrier(4)
    found: list[ops.BackwardScope] = []

    def ask() -> None:
        barrier.wait()
        found.append(scaler.scope(owner="shared"))

    together(*[ask] * 4)
    assert all(scope is found[0] for scope in found)


def test_without_any_scope_nothing_was_found() -> None:
    scaler = LossScaler(16.0, growth_interval=1)
    assert scaler.found_inf().tolist() == [0.0]
    scaler.update()
    assert scaler.get_scale() == 32.0


def test_disabled_keeps_the_scale_at_one_but_still_finds_overflow() -> None:
    scaler = LossScaler(enabled=False)
    scope = scaler.scope()
    scope.found_inf.fill_(1)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert scaler.found_inf().item() == 1
    assert scaler.state_dict() == {}
    scaler.load_state_dict({"scale": 7.0})
    assert scaler.get_scale() == 1.0
    x = torch.tensor(3.0, requires_grad=True)
    assert scaler.scale(x).item() == 3.0


def test_inv_scale_is_rounded_as_torchs() -> None:
    scaler = LossScaler(1.1)
    assert scaler.scope().inv_scale.item() == torch.tensor(1.1).double().reciprocal().float().item()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("init_scale", 0.0), ("growth_factor", 1.0), ("backoff_factor", 1.0), ("backoff_factor", 0.0),
     ("growth_interval", 0), ("init_scale", float("nan")), ("init_scale", float("inf")), ("init_scale", 1e39)],
)  # fmt: skip
def test_arguments_that_cannot_work_are_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(argument) + " must .*" + re.escape(str(value))):
        LossScaler(**{argument: value})
