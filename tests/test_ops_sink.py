"""Scopes reach the backward they were opened for, and no other; sinks get what belongs to their parameter."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_equal
from together import together
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spu import ops
from spu.ops import sink as sink_module


def scope_of(scale: float = 1024.0) -> ops.BackwardScope:
    return ops.BackwardScope(torch.tensor([scale]), torch.tensor([1 / scale]), torch.zeros(1))


class Recorder(ops.GradSink):
    """A sink that keeps what it was given, but not the graph of x, which would keep the parameter alive."""

    def __init__(self) -> None:
        self.weights: list[tuple[Tensor, Tensor, str]] = []
        self.biases: list[tuple[Tensor, str]] = []
        self.scopes: list[ops.BackwardScope | None] = []

    def linear_weight(self, dz: Tensor, x: Tensor, backend: str) -> None:
        self.weights.append((dz, x.detach(), backend))
        self.scopes.append(ops.current_scope())

    def linear_bias(self, dz: Tensor, backend: str) -> None:
        self.biases.append((dz, backend))
        self.scopes.append(ops.current_scope())


def record_scope(x: Tensor, seen: list[ops.BackwardScope | None]) -> Tensor:
    """x, whose gradient's arrival notes the current scope."""
    y = x * 1
    y.register_hook(lambda _: seen.append(ops.current_scope()))
    return y


@pytest.mark.parametrize("kind", ["plain", "watched", "leaf"])
def test_a_backward_runs_in_the_scope_of_its_roots(kind: str) -> None:
    """Where a hook of the user's or a leaf comes first, by a node of its own in front of it."""
    seen: list[ops.BackwardScope | None] = []
    x, scope = torch.ones(3, requires_grad=True), scope_of()
    root = x if kind == "leaf" else record_scope(x, seen) * 2
    if kind != "plain":
        root.register_hook(lambda _: seen.append(ops.current_scope()))
    (begin,) = sink_module.scoped([root], scope)
    assert (begin is root) == (kind == "plain")
    begin.backward(torch.ones(3))
    assert seen == [scope] * {"plain": 1, "watched": 2, "leaf": 1}[kind]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0 if kind == "leaf" else 2.0] * 3
    assert not sink_module._SCOPES


def test_a_scope_lives_for_its_backward_only() -> None:
    seen: list[ops.BackwardScope | None] = []
    x, scope = torch.ones(3, requires_grad=True), scope_of()
    ops.open_scope(record_scope(x, seen).sum(), scope).backward()
    record_scope(x, seen).sum().backward()
    assert seen == [scope, None]
    assert ops.current_scope() is None
    assert not sink_module._SCOPES


def test_open_scope_is_the_identity() -> None:
    x = torch.randn(3, requires_grad=True)
    y = ops.open_scope(x * 3, scope_of())
    assert_equal(y.detach(), x.detach() * 3)
    y.backward(torch.ones(3))
    assert_equal(x.grad, torch.full((3,), 3.0))


class Pair(NamedTuple):
    hidden: Tensor
    rest: object


@pytest.mark.parametrize("used", [0, 1])
def test_open_scope_keeps_structure_and_serves_every_output(used: int) -> None:
    seen: list[ops.BackwardScope | None] = []
    x, scope = torch.ones(3, requires_grad=True), scope_of()
    mask = torch.ones(3, dtype=torch.bool)
    outputs = ops.open_scope((record_scope(x, seen), record_scope(x, seen) * 2, mask, None, "text"), scope)
    assert isinstance(outputs, tuple)
    assert outputs[2] is mask
    assert outputs[3:] == (None, "text")
    outputs[used].sum().backward()
    assert seen == [scope] * len(seen)  # the hook of the unused output may be called too, with None
    assert seen
    pair = ops.open_scope(Pair(x * 1, None), scope)
    assert isinstance(pair, Pair)
    assert isinstance(ops.open_scope([x * 1], scope), list)
    with pytest.raises(TypeError, match="dict"):
        ops.open_scope({"x": x}, scope)


def test_open_scope_of_what_needs_no_gradient_is_the_thing_itself() -> None:
    x = torch.ones(3)
    assert ops.open_scope(x, scope_of()) is x


def test_several_roots_of_one_backward_share_the_scope() -> None:
    seen: list[ops.BackwardScope | None] = []
    x, scope = torch.ones(3, requires_grad=True), scope_of()
    outputs = ops.open_scope((record_scope(x, seen), record_scope(x, seen)), scope)
    torch.autograd.backward(outputs, (torch.ones(3), torch.ones(3)))
    assert seen == [scope, scope]


def test_concurrent_backwards_keep_their_own_scopes() -> None:
    weight = torch.randn(8, 8)
    failures: list[str] = []
    sinks: list[weakref.ref[Recorder]] = []
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        parameter, recorder = nn.Parameter(weight.clone()), Recorder()
        ops.attach_sink(parameter, recorder)
        sinks.append(weakref.ref(recorder))
        scope = scope_of(2.0**i)
        barrier.wait()
        for turn in range(40):
            with ops.use_backend("reference"):
                y = ops.linear_act(ops.linear_act(torch.ones(2, 8), parameter), parameter).sum()
            scoped = turn % 2 == 0
            (ops.open_scope(y, scope) if scoped else y).backward()
            if scoped and parameter.grad is not None:
                failures.append(f"thread {i}, turn {turn}: a gradient beside the sink")
            if not scoped and parameter.grad is None:
                failures.append(f"thread {i}, turn {turn}: no plain gradient")
            parameter.grad = None
        if recorder.scopes != [scope] * 40:
            failures.append(f"thread {i}: {len(recorder.scopes)} scopes, foreign ones among them")

    together(*(partial(work, i) for i in range(4)))
    assert not failures, failures
    assert not sink_module._SCOPES
    gc.collect()
    assert not any(sink() for sink in sinks), "a sink lives no longer than its parameter"


def test_a_nested_backward_has_no_scope_until_it_is_opened_again() -> None:
    seen: list[ops.BackwardScope | None] = []
    scope, x = scope_of(), torch.ones(3, requires_grad=True)
    for reopened in (False, True):
        inner = record_scope(x, seen).sum()
        leaf = inner.detach().requires_grad_()

        def continue_backward(grad: Tensor, inner: Tensor = inner, reopened: bool = reopened) -> None:
            (ops.open_scope(inner, scope) if reopened else inner).backward(grad)

        leaf.register_hook(continue_backward)
        ops.open_scope(record_scope(leaf, seen) * 2, scope).backward()
    assert seen == [scope, None, scope, scope]
    assert not sink_module._SCOPES


def test_a_backward_that_fails_leaves_no_scope_to_others() -> None:
    def fail(_: Tensor) -> None:
        raise RuntimeError("boom")

    y = torch.ones(3, requires_grad=True) * 2
    y.register_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        ops.open_scope(y.sum(), scope_of()).backward()
    assert not sink_module._SCOPES
    seen: list[ops.BackwardScope | None] = []
    record_scope(torch.ones(3, requires_grad=True), seen).sum().backward()
    assert seen == [None]


@every_backend
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_sink_gets_the_parameters_own_gradient(backend: str, checkpointed: bool) -> None:
    """Also under activation checkpointing, where saved tensors come back as other objects."""
    weight, bias = nn.Parameter(torch.randn(5, 8).half()), nn.Parameter(torch.randn(5).half())
    recorder = Recorder()
    ops.attach_sink(weight, recorder)
    ops.attach_sink(bias, recorder)
    x, scope = torch.randn(2, 3, 8).half().requires_grad_(), scope_of()

    def layer(x: Tensor) -> Tensor:
        return ops.linear_act(x, weight, bias, "gelu")

    with ops.use_backend(backend):
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        ops.open_scope(y.sum(), scope).backward()
    assert weight.grad is None
    assert bias.grad is None
    assert x.grad is not None
    (dz, saved_x, name), (bias_dz, bias_name) = recorder.weights[0], recorder.biases[0]
    assert len(recorder.weights) == len(recorder.biases) == 1
    assert recorder.scopes == [scope, scope]
    assert name == bias_name == backend
    assert_equal(saved_x.detach(), x.detach(), "x")
    assert_equal(bias_dz, dz, "dz")
    with ops.use_backend(backend):
        layer(x).sum().backward()  # without a scope: ordinary gradients
    assert weight.grad is not None
    assert len(recorder.weights) == 1


class Asked:
    """One fused layer with a sink, and a backward from its sum in a scope of scale 4."""

    def __init__(self) -> None:
        self.weight, self.recorder = nn.Parameter(torch.randn(5, 8)), Recorder()
        ops.attach_sink(self.weight, self.recorder)
        self.x = torch.randn(2, 8, requires_grad=True)
        self.loss = ops.open_scope(ops.linear_act(self.x, self.weight).sum() * 4, scope_of(4.0))
        self.scaled = 4 * self.x.detach().sum(0).expand(5, 8)


def test_only_a_gradient_that_is_accumulated_goes_to_the_sink() -> None:
    asked = Asked()
    torch.autograd.grad(asked.loss, [asked.x], retain_graph=True)
    asked.loss.backward(inputs=[asked.x], retain_graph=True)
    assert not asked.recorder.weights
    assert asked.weight.grad is None
    for leaves in ([asked.weight], [asked.weight, asked.x]):
        gradient = torch.autograd.grad(asked.loss, leaves, retain_graph=True)[0]
        torch.testing.assert_close(gradient, asked.scaled)
    assert not asked.recorder.weights
    asked.loss.backward(inputs=[asked.weight], retain_graph=True)
    asked.loss.backward()
    assert len(asked.recorder.weights) == 2


def test_every_fused_op_asks_about_each_of_its_weights() -> None:
    x, target, bias = torch.randn(3, 8), torch.randint(8, (3,)), torch.zeros(8, requires_grad=True)
    cases: list[tuple[int, Callable[..., Tensor]]] = [
        (1, lambda w: ops.linear_act(x, w, bias)),
        (1, lambda w: ops.linear_act(x, w, transposed=True)),
        (3, lambda *weights: ops.gated_mlp(x, *weights)),
        (1, lambda w: ops.linear_cross_entropy(x, w, target)),
    ]
    for count, op in cases:
        weights, recorders = [nn.Parameter(torch.randn(8, 8)) for _ in range(count)], [Recorder() for _ in range(count)]
        for weight, recorder in zip(weights, recorders, strict=True):
            ops.attach_sink(weight, recorder)
        loss = ops.open_scope(op(*weights).sum(), scope_of())
        for i, weight in enumerate(weights):
            loss.backward(inputs=[weight], retain_graph=True)
            assert [len(recorder.weights) for recorder in recorders] == [int(j <= i) for j in range(count)]
            assert all(other.grad is None for other in weights)


def test_a_hook_of_the_users_on_a_weight_sees_its_gradient() -> None:
    """Scaled, as in torch, whether it came before or after the sink's own hook."""
    asked, seen = Asked(), []
    handle = asked.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    asked.loss.backward(retain_graph=True)
    assert not asked.recorder.weights
    assert_equal(seen[0], asked.scaled, "what the hook saw")
    handle.remove()
    asked.loss.backward()
    assert len(asked.recorder.weights) == len(seen) == 1


def test_losses_with_two_scales_have_no_common_backward() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="one backward for each"):
        (ops.open_scope(x.sum(), scope_of(8.0)) + ops.open_scope(x.sum(), scope_of(2.0))).backward()
    assert not sink_module._SCOPES
    scope = scope_of()
    (ops.open_scope(x.sum(), scope) + ops.open_scope(x.prod(), scope.on(torch.device("meta")))).backward()


def test_a_scope_on_another_device_has_the_scale_and_a_flag_there() -> None:
    scope, meta = scope_of(), torch.device("meta")
    assert scope.on(torch.device("cpu")) is scope
    other = scope.on(meta)
    assert other is scope.on(meta)
    assert {value.device for value in (other.scale, other.inv_scale, other.found_inf)} == {meta}


def test_derived_weights_and_detached_sinks_take_the_plain_way() -> None:
    weight, recorder = nn.Parameter(torch.randn(5, 8)), Recorder()
    ops.attach_sink(weight, recorder)
    ops.open_scope(ops.linear_act(torch.randn(2, 8), weight * 2).sum(), scope_of()).backward()
    assert weight.grad is not None
    ops.detach_sink(weight)
    ops.detach_sink(weight)
    assert ops.sink_of(weight) is None
    ops.open_scope(ops.linear_act(torch.randn(2, 8), weight).sum(), scope_of()).backward()
    assert not recorder.weights
    with pytest.raises(ValueError, match="leaf"):
        ops.attach_sink(weight * 2, recorder)


def test_sinks_keep_no_parameter_alive_and_do_not_travel() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ops.attach_sink(parameter, Recorder())
    assert ops.sink_of(nn.Parameter(parameter.detach())) is None
    gone = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert gone() is None


@pytest.mark.leaks_threads  # Dynamo's progress monitor
def test_a_compiled_region_inside_a_scope_gives_plain_gradients() -> None:
    weight, recorder = nn.Parameter(torch.randn(5, 8)), Recorder()
    ops.attach_sink(weight, recorder)
    x = torch.randn(2, 8)
    compiled = torch.compile(lambda x: ops.linear_act(x, weight, None, "silu"), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops.open_scope(compiled(x).sum(), scope_of()).backward()
    assert not recorder.weights
    expected = torch.autograd.grad(F.silu(F.linear(x, weight)).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_a_scope_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"found_inf must be float32 of shape \(1,\) on cpu, got torch.bool \(1,\)"):
        ops.BackwardScope(torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.bool))
