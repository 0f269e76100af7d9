"""A canary for every private name of torch: its failure says which torch changed it, and what spu needs it for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spu.common import torch_private as private
from spu.ops.dispatch import choose_backend

CHECKED: set[str] = set()
_Test = Callable[[], None]


def canary(*names: str, uses: str) -> Callable[[_Test], _Test]:
    """Mark a test as the check of these names; its failure says whose fault it is."""
    CHECKED.update(names)

    def wrap(test: _Test) -> _Test:
        @functools.wraps(test)
        def run() -> None:
            try:
                test()
            except Exception as error:
                pytest.fail(
                    f"torch {torch.__version__} changed what stands behind {', '.join(names)} in "
                    f"spu/common/torch_private.py, which spu uses for {uses}: {type(error).__name__}: {error}"
                )

        return run

    return wrap


class Seen(private.TorchDispatchMode):
    """The operators that run while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@canary("graph_task_id", "at_end_of_backward", uses="the loss scale of one backward")
def test_a_backward_has_an_id_and_an_end() -> None:
    assert private.graph_task_id() == -1
    seen: list[object] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2

    def hook(_: Tensor) -> None:
        seen.append(private.graph_task_id())
        private.at_end_of_backward(lambda: seen.append("end"))

    y.register_hook(hook)
    x.register_hook(lambda _: seen.append(private.graph_task_id()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    first, again, end, second, third, last = seen
    assert first == again != -1
    assert second == third != first
    assert (end, last, private.graph_task_id()) == ("end", "end", -1)


@canary("will_execute", uses="whether a weight's gradient goes to p.grad")
def test_a_backward_tells_which_leaves_it_accumulates() -> None:
    asked: list[bool] = []
    x, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = x * weight
    node = next(n for n, _ in y.grad_fn.next_functions if n.variable is weight)  # type: ignore[union-attr]
    z = y * 1
    z.register_hook(lambda _: asked.append(private.will_execute(node)))
    z.sum().backward(retain_graph=True)
    z.sum().backward(inputs=[x], retain_graph=True)
    assert asked == [True, False]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(z.sum(), [weight])


@canary("BelowAutograd", uses="the forward of spu's autograd functions")
def test_below_autograd_nothing_is_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    with private.BelowAutograd():
        assert (x * 2).grad_fn is None
    assert (x * 2).grad_fn is not None


@canary("sequence_number", "running_node_number", uses="which layer draws in its backward")
def test_nodes_are_numbered_in_the_order_they_are_made() -> None:
    seen: list[int | None] = []
    x = torch.ones(2, requires_grad=True)
    before = private.sequence_number()
    y = x * 2
    y.grad_fn.register_hook(lambda *_: seen.append(private.running_node_number()))  # type: ignore[union-attr]

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, dz: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(private.running_node_number())
            return dz

    Asks.apply(y).sum().backward()  # type: ignore[no-untyped-call]
    assert seen[0] == before + 1
    assert private.running_node_number() is None


@canary("any_autocast", uses="skipping autocast's questions")
def test_autocast_of_any_device_is_known() -> None:
    assert not private.any_autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert private.any_autocast()


@canary("transformed", "forward_mode_active", uses="leaving calls to torch's own ops")
def test_transforms_and_recorders_are_known() -> None:
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((private.transformed(), private.forward_mode_active()))
        return x * 2

    x = torch.ones(2)
    look(x)
    torch.func.vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    assert seen == [(False, False), (True, False), (True, False), (True, True)]

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 if private.transformed() else x * 2

    assert not private.transformed()
    assert 3 in [n.args[1] for n in torch.export.export(Layer(), (x,)).graph.nodes if len(n.args) == 2]


@canary("constant_when_traced", uses="choosing a backend under torch.compile")
def test_a_marked_function_is_run_while_dynamo_traces() -> None:
    runs: list[threading.Thread] = []

    @private.constant_when_traced
    def number() -> int:
        runs.append(threading.current_thread())  # would break the graph
        return 3

    function = torch.compile(lambda x: x * number(), backend="eager", fullgraph=True)
    assert torch.equal(function(torch.ones(2)), torch.full((2,), 3.0))
    function(torch.ones(2))
    assert len(runs) >= 1


@canary("version", "set_version", "saved_tensor_hooks", uses="finding changes in place")
def test_a_tensor_counts_its_changes() -> None:
    x = torch.zeros(3)
    before = private.version(x)
    x[1:].add_(1)
    assert private.version(x) == before + 1
    private.set_version(x, before)
    assert private.version(x) == before
    assert private.saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(str, float):  # type: ignore[arg-type]
        assert private.saved_tensor_hooks() == (str, float)


@canary("is_view", "view_base", "unsafe_view", uses="views of leaves that cross stages, results changed in place")
def test_a_view_knows_its_base() -> None:
    x = torch.ones(4, requires_grad=True)
    y = x[1:]
    assert private.is_view(y)
    assert not private.is_view(x)
    assert private.view_base(y) is x
    assert private.view_base(x) is None
    assert not private.is_view(private.unsafe_view(torch.ones(4), torch.Size((2, 2))))


@canary("backward_hooks", "post_accumulate_hooks", "set_hooks", uses="gradients that a user's hook is to see")
def test_a_tensors_hooks_can_be_read_and_replaced() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not any((private.backward_hooks(x), private.post_accumulate_hooks(x)))
    seen: list[str] = []
    x.register_hook(lambda _: seen.append("hook"))
    x.register_post_accumulate_grad_hook(lambda _: seen.append("post"))
    hooks, post = private.backward_hooks(x), private.post_accumulate_hooks(x)
    assert hooks
    assert post
    private.set_hooks(x, None, None)
    x.sum().backward()
    assert not seen
    private.set_hooks(x, hooks, post)
    x.sum().backward()
    assert seen == ["hook", "post"]


@canary("storage_id", "has_alias", uses="counting memory once")
def test_storages_are_told_apart() -> None:
    with private.FakeTensorMode():
        a = torch.ones(4)
        assert private.storage_id(a) == private.storage_id(a[1:]) != private.storage_id(torch.ones(4))
    x = torch.ones(4)
    assert not private.has_alias(x)
    y = x[1:]
    assert private.has_alias(x)
    del y
    assert not private.has_alias(x)


@canary("generators_equal", uses="which generator an operator was given")
def test_generators_are_told_apart() -> None:
    one = torch.Generator()
    assert private.generators_equal(one, one)
    assert not private.generators_equal(one, torch.Generator())


@canary("MODULE_TABLES", "parameters_of", "buffers_of", "children_of", "set_tables", uses="tied parameters")
def test_a_modules_tables_are_its_own() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    norm = module[0]
    assert set(private.MODULE_TABLES) <= vars(module).keys()
    assert private.children_of(module) == {"0": norm}
    assert private.parameters_of(norm)["weight"] is norm.weight
    assert private.buffers_of(norm)["running_mean"] is norm.running_mean
    weight = nn.Parameter(torch.zeros(2))
    private.parameters_of(norm)["weight"] = weight
    assert norm.weight is weight
    private.set_tables(norm, {"weight": None}, {}, {})
    assert not list(norm.parameters())
    assert not list(norm.buffers())


@canary("MODULE_HOOKS", "has_global_module_hook", "global_hook_tables", uses="hooks that fused blocks would not call")
def test_hooks_of_modules_are_found() -> None:
    module = nn.Linear(2, 2)
    assert not any(vars(module)[name] for name in private.MODULE_HOOKS)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert all(vars(module)[name] for name in private.MODULE_HOOKS)
    before = sum(map(len, private.global_hook_tables()))
    assert not private.has_global_module_hook()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert private.has_global_module_hook()
        assert sum(map(len, private.global_hook_tables())) == before + 1
    finally:
        hook.remove()


@canary("inner_of_compiled", "swap_compiled_call", uses="looking inside torch.compile's modules")
def test_what_compile_has_wrapped_is_found() -> None:
    module = nn.Linear(2, 2)
    assert private.inner_of_compiled(torch.compile(module)) is module
    assert private.inner_of_compiled(module) is private.inner_of_compiled(len) is None
    module.compile(backend="eager")
    compiled = private.swap_compiled_call(module)
    runs: list[Tensor] = []
    module.forward = runs.append  # type: ignore[method-assign]
    module(torch.ones(2))
    assert len(runs) == 1
    assert private.swap_compiled_call(module, compiled) is None is not compiled


@canary("DropoutNd", "Moved", "NormBase", "RECURRENT", uses="layers that draw, keep fp32 statistics, share buffers")
def test_bases_of_layers() -> None:
    assert issubclass(nn.Dropout2d, private.DropoutNd)
    assert issubclass(nn.InstanceNorm2d, private.NormBase)
    told = type("Told", (private.Moved,), {"moved": lambda self: setattr(self, "was_told", True)})()
    assert nn.Sequential(told).to(torch.float64)[0].was_told
    assert {getattr(nn.modules.rnn._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")} == private.RECURRENT


@canary("legacy_reduction", uses="weighing microbatches by a loss's old arguments")
def test_old_arguments_of_losses() -> None:
    assert private.legacy_reduction(None, False) == "none"
    assert private.legacy_reduction(False, None) == "sum"
    assert private.legacy_reduction(True, True) == "mean"


@canary("has_step_hooks", uses="optimizers that a scheduler holds on to")
def test_what_holds_on_to_an_optimizer() -> None:
    def make() -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    optimizer = make()
    assert not private.has_step_hooks(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert private.has_step_hooks(optimizer)
    optimizer = make()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert private.has_step_hooks(optimizer)


@canary(
    "CASTING_COPY", "TorchDispatchMode", "operator_has_kernel", "operator_names", "packet_of", "schema_of", uses="ops"
)
def test_operators_tell_what_they_are() -> None:
    x = torch.ones(2)
    with Seen() as mode:
        x.add_(1)
        x.half()
    add, copy = mode.operators
    assert copy is private.CASTING_COPY
    first = private.schema_of(add).arguments[0]
    assert (first.name, first.alias_info is not None and first.alias_info.is_write) == ("self", True)
    assert private.packet_of(add) is torch.ops.aten.add_
    assert private.packet_of(torch.ops.higher_order.cond) is None
    assert "aten::bernoulli" in private.operator_names()
    assert private.operator_has_kernel("aten::mm", "CPU")
    assert not private.operator_has_kernel("aten::mm", "CompositeImplicitAutograd")


@canary("grouped_mm", "flash_attention_for_cpu", "has_onednn_sums", uses="fake forms, counts of work, gradients' sums")
def test_operators_with_private_names() -> None:
    assert private.grouped_mm().overloadpacket.__name__ == "_grouped_mm"
    with Seen() as mode:
        q = torch.ones(1, 1, 4, 8)
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert private.flash_attention_for_cpu() in map(private.packet_of, mode.operators)
    assert all(isinstance(private.has_onednn_sums(dtype), bool) for dtype in (torch.bfloat16, torch.float16))


@canary("foreach_add_", "unscale_and_check_", "update_scale_", "end_pool", uses="step counts, loss scales, graphs")
def test_arithmetic_of_optimizers() -> None:
    with pytest.raises(RuntimeError):
        private.end_pool(0, (0, 1))
    steps = [torch.zeros(()), torch.ones(())]
    private.foreach_add_(steps, torch.ones(()))
    assert [float(step) for step in steps] == [1.0, 2.0]
    found, grads = torch.zeros(1), [torch.full((2,), 4.0)]
    private.unscale_and_check_(grads, found, torch.full((1,), 0.5))
    assert (grads[0].tolist(), float(found)) == ([2.0, 2.0], 0.0)
    private.unscale_and_check_([torch.tensor([torch.inf])], found, torch.ones(1))
    assert found
    scale, tracker = torch.full((1,), 8.0), torch.zeros(1, dtype=torch.int32)
    private.update_scale_(scale, tracker, found, 2.0, 0.5, 2)
    assert scale == 4.0
    for _ in range(2):
        private.update_scale_(scale, tracker, torch.zeros(1), 2.0, 0.5, 2)
    assert scale == 8.0


@canary("carry", "carried", uses="forced backends in a GPU's backward")  # handed to its threads by torch
def test_a_value_is_carried() -> None:
    assert private.carried("spu test") is None
    private.carry("spu test", "a")
    assert private.carried("spu test") == "a"


@canary("GENERIC_KEY", "is_generic_key_included", "include_generic_key", "without_generic_key", uses="random draws")
def test_a_dispatch_key_of_our_own() -> None:
    assert not private.is_generic_key_included()
    private.include_generic_key(True)
    try:
        assert private.is_generic_key_included()
        with private.without_generic_key():
            torch.zeros(1).bernoulli_(0.5)
        assert private.is_generic_key_included()
    finally:
        private.include_generic_key(False)
    assert not private.is_generic_key_included()


@canary("FakeTensor", "FakeTensorMode", "fake_mode_active", "is_fake", "unset_fake_temporarily", uses="planning")
def test_fake_tensors() -> None:
    assert not private.fake_mode_active()
    with private.FakeTensorMode():
        assert private.fake_mode_active()
        x = torch.ones(2)
        with private.unset_fake_temporarily():
            assert not private.is_fake(torch.ones(2))
    assert isinstance(x, private.FakeTensor)
    assert private.is_fake(x)
    assert choose_backend(x) == choose_backend(torch.ones(2))


@canary("pytree", "tree_leaves", "tree_map", "tree_map_only", uses="batches and outputs of any structure")
def test_trees() -> None:
    tree = {"a": [1, (torch.ones(1), None)]}
    assert private.pytree.tree_unflatten(*private.pytree.tree_flatten(tree)) == tree
    assert private.tree_leaves(tree) == private.pytree.tree_flatten(tree)[0] == [1, tree["a"][1][0], None]  # type: ignore[index]
    assert private.tree_map(str, {"a": 1}) == {"a": "1"}
    assert private.tree_map_only(int, lambda n: n + 1, [1, "x"]) == [2, "x"]


def test_every_private_name_has_a_canary() -> None:
    assert set(private.__all__) == CHECKED
