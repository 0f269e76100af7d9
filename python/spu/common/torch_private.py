"""torch's private names: all that spu uses of them, each with what it is needed for.

Nothing promises that they stay: each has a canary test, and no other module may use one. Verified with torch 2.13.0.

What a hot path calls is the private function itself under a public name: a wrapper would cost 0.1 us a call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import _VF, compiler, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = [
    "CASTING_COPY", "GENERIC_KEY", "MODULE_HOOKS", "MODULE_TABLES", "RECURRENT", "BelowAutograd", "DropoutNd",
    "FakeTensor", "FakeTensorMode", "Moved", "NormBase", "TorchDispatchMode", "any_autocast", "at_end_of_backward",
    "backward_hooks", "buffers_of", "carried", "carry", "children_of", "constant_when_traced", "end_pool",
    "fake_mode_active", "flash_attention_for_cpu", "foreach_add_", "forward_mode_active", "generators_equal",
    "global_hook_tables", "graph_task_id", "grouped_mm", "has_alias", "has_global_module_hook", "has_onednn_sums",
    "has_step_hooks", "include_generic_key", "inner_of_compiled", "is_fake", "is_generic_key_included", "is_view",
    "legacy_reduction", "operator_has_kernel", "operator_names", "packet_of", "parameters_of",
    "post_accumulate_hooks", "pytree", "running_node_number", "saved_tensor_hooks", "schema_of", "sequence_number",
    "set_hooks", "set_tables", "set_version", "storage_id", "swap_compiled_call", "transformed", "tree_leaves",
    "tree_map", "tree_map_only", "unsafe_view", "unscale_and_check_", "unset_fake_temporarily", "update_scale_",
    "version", "view_base", "will_execute", "without_generic_key",
]  # fmt: skip

_T = TypeVar("_T", bound=Callable[..., Any])


# The autograd engine

graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
"""Return the id of the engine's run on this thread, -1 outside a backward. For: which loss scale a backward has."""

will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Return whether the running backward reaches a node; raise RuntimeError for a leaf whose gradient ``autograd.grad``
returns. For: whether a fused op's weight gradient goes to ``p.grad``."""

BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
"""Context in which operators are not recorded. For: the forward of spu's autograd functions."""


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Let the engine call ``callback`` at the end of the running backward, if that succeeds. For: its loss scale."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def sequence_number() -> int:
    """Return the number that the next autograd node of this thread gets. For: which layer made a node."""
    return torch._C._autograd._get_sequence_nr()


def running_node_number() -> int | None:
    """Return the number of the node whose backward runs on this thread; None outside one. For: which layer draws."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def saved_tensor_hooks() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None:
    """Return what packs and unpacks saved tensors now, if anything does. For: looking at a checkpoint's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[no-any-return]


def _owning(stash: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Return ``stash`` as a function that takes a reference to what it keeps, and has given it back with the next.

    torch 2.11 takes none and gives one back all the same, so that a value was freed while others still had it.
    """
    probe = object()
    before = sys.getrefcount(probe)
    stash("spu probe", probe)
    if sys.getrefcount(probe) > before:
        return stash
    take = ctypes.pythonapi.Py_IncRef
    take(ctypes.py_object(probe))

    def owned(name: str, value: Any) -> None:
        take(ctypes.py_object(value))
        stash(name, value)

    return owned


carry: Callable[[str, Any], None] = _owning(torch._C._stash_obj_in_tls)
"""Let the threads in which a backward of this thread runs find a value under a name. For: a forced backend."""


def carried(name: str) -> Any:
    """Return what ``carry`` has put under a name in this thread, or in the one whose backward it runs; else None."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None


# What the ops ask before they serve a call

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Return whether autocast is on for any device. For: skipping the question for each."""

_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_jit_tracing: Callable[[], bool] = torch._C._is_tracing


def constant_when_traced(function: _T) -> _T:
    """Mark a function as ``torch.compiler.assume_constant_result`` does, without the import of all of Dynamo. Dynamo
    runs the function as it stands while it traces, and takes the result for a constant of the graph.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# While Dynamo traces, it is run as it stands, inside the transforms that it has entered, and the result is a constant
# of the graph, which Dynamo guards by the stack of transforms.
@constant_when_traced
def _watched() -> bool:
    return _functorch_active() or _jit_tracing() or compiler._is_exporting_flag


def forward_mode_active() -> bool:
    """Return whether forward-mode derivatives are taken. For: refusing those of a backward."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Return whether a transform, a forward-mode derivative or a recorder (``torch.func``, ``torch.jit.trace``,
    ``torch.export``) looks at the operators that are called now. For: leaving the call to torch's own ops."""
    return forward_ad._current_level >= 0 or _watched()


# Tensors


def version(tensor: torch.Tensor) -> int:
    """Return how often the tensor's values were changed in place. For: finding changes that no stage may make."""
    return tensor._version


def set_version(tensor: torch.Tensor, number: int) -> None:
    """Set what ``version`` returns. For: planning, which leaves no trace."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (number,))


def is_view(tensor: torch.Tensor) -> bool:
    """Return whether autograd takes the tensor for a view of another."""
    return tensor._is_view()


def view_base(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor that this one is a view of, None if it is none. For: views of leaves that cross stages."""
    return tensor._base if tensor._is_view() else None


def backward_hooks(tensor: torch.Tensor) -> dict[int, Callable[..., Any]] | None:
    """Return the hooks of ``register_hook``. For: gradients that a user's hook is to see."""
    return tensor._backward_hooks


def post_accumulate_hooks(tensor: torch.Tensor) -> dict[int, Callable[..., Any]] | None:
    """Return the hooks of ``register_post_accumulate_grad_hook``. For: gradients that must not be deferred."""
    return tensor._post_accumulate_grad_hooks  # type: ignore[attr-defined,no-any-return]


def set_hooks(tensor: torch.Tensor, backward: Any, post_accumulate: Any) -> None:
    """Replace both kinds of hooks; None removes. For: planning, which leaves no trace."""
    owner: Any = tensor  # torch's stubs have no None for hooks
    owner._backward_hooks = backward
    if post_accumulate is None and owner._post_accumulate_grad_hooks is not None:
        owner._post_accumulate_grad_hooks = {}  # torch goes on calling those that None replaces
    owner._post_accumulate_grad_hooks = post_accumulate


def storage_id(tensor: torch.Tensor) -> int:
    """Return a number that two tensors have in common if they share a storage; a fake one has no address. For: counting
    memory once. A sparse tensor raises NotImplementedError."""
    return tensor.untyped_storage()._cdata


def has_alias(tensor: torch.Tensor) -> bool:
    """Return whether anything besides this tensor uses its storage; True where torch cannot tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is None or count(tensor.untyped_storage()._cdata) > 2  # the tensor and the storage object made here


def generators_equal(a: torch.Generator, b: torch.Generator) -> bool:
    """Return whether two objects are one generator: the dispatcher passes on another object than it was given."""
    return a._cdata == b._cdata  # type: ignore[attr-defined]


CASTING_COPY = torch.ops.aten._to_copy.default  # `tensor.to(dtype)` to a dispatch mode. For: tensors that lie in files.


# Modules

MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Names of a module's attributes that hold its tensors and children."""

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Names of a module's tables of hooks. For: what a fused forward would not call."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own table of parameters, to read and to write, duplicates kept. For: tied parameters."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the module's own table of buffers, to read and to write."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own table of children: with those that it has twice. For: a layer that is used twice."""
    return module._modules


class Moved(nn.Module):
    """A module that is told when ``.to()`` and its like have replaced its buffers."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.moved()
        return self

    def moved(self) -> None:
        """Do what is to be done then."""


def set_tables(
    module: nn.Module,
    parameters: dict[str, nn.Parameter | None],
    buffers: dict[str, torch.Tensor | None],
    children: dict[str, nn.Module | None],
) -> None:
    """Give a shallow copy of a module tables of its own."""
    module.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)


def swap_compiled_call(module: nn.Module, other: Any = None) -> Any:
    """Undo ``module.compile()``, whose result runs the forward of the module that it was called of; return that."""
    was, module.__dict__["_compiled_call_impl"] = module.__dict__.get("_compiled_call_impl"), other
    return was


def has_global_module_hook() -> bool:
    """Return whether a hook on all modules exists. For: blocks that call no module."""
    return _module._has_any_global_hook()


def global_hook_tables() -> list[dict[int, Any]]:
    """Return the tables of hooks on all modules. For: planning without the user's hooks."""
    return [getattr(_module, f"_global{name}") for name in MODULE_HOOKS]


def inner_of_compiled(module: object) -> nn.Module | None:
    """Return the module that ``torch.compile`` made this one from; None for any other. For: looking inside it."""
    if not isinstance(module, nn.Module) or not type(module).__module__.startswith("torch._dynamo"):
        return None
    return module._modules.get("_orig_mod")


def legacy_reduction(size_average: Any, reduce: Any) -> str:
    """Return the reduction that a loss's old arguments stand for. For: weighing microbatches."""
    return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a scheduler, or a hook, holds on to this very optimizer. For: keeping the object."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return hasattr(optimizer.step, "_wrapped_by_lr_sched") or any(hooks)


# Operators

RECURRENT: frozenset[Any] = frozenset({_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu})
"""What the recurrent modules call. For: one dtype for their operands."""


def schema_of(operator: Any) -> torch.FunctionSchema:
    """Return the schema of an operator that a dispatch mode has met. For: what it writes."""
    return operator._schema  # type: ignore[no-any-return]


def packet_of(operator: Any) -> Any:
    """Return the operator of all overloads; None for what has none (a higher-order operator)."""
    return getattr(operator, "_overloadpacket", None)


def operator_names() -> list[str]:
    """Return ``namespace::name.overload`` of all operators. For: finding those that draw."""
    return torch._C._dispatch_get_all_op_names()


def operator_has_kernel(name: str, key: str) -> bool:
    """Return whether ``namespace::name.overload`` has a kernel of its own for a dispatch key. For: compiled ops."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def grouped_mm() -> Any:
    """Return the grouped product's operator. For: its fake form, which refuses dtypes that the real one takes."""
    return torch.ops.aten._grouped_mm.default


def unsafe_view(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a view that autograd does not treat as one. For: a result that is changed in place."""
    return torch.ops.aten._unsafe_view(tensor, shape)  # type: ignore[no-any-return]


def flash_attention_for_cpu() -> Any:
    """Return the CPU's fused attention; None where torch has none. For: counting its work."""
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def has_onednn_sums(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has convolutions for a 16-bit dtype on this processor. For: who sums their gradients."""
    known = torch.ops.mkldnn
    return bool(known._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported())


def foreach_add_(tensors: list[torch.Tensor], value: torch.Tensor) -> None:
    """Add a tensor of no dimension to each of a list; torch._foreach_add_ would wait for it. For: step counts."""
    torch.ops.aten._foreach_add_.Tensor(tensors, value)


def unscale_and_check_(grads: list[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """Multiply by ``inv_scale`` in place and set ``found_inf`` to 1 for a non-finite value, as GradScaler does."""
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)


def update_scale_(
    scale: torch.Tensor, tracker: torch.Tensor, found_inf: torch.Tensor, growth: float, backoff: float, interval: int
) -> None:
    """Change the loss scale after a step, on the device: the rule of torch's GradScaler."""
    torch._amp_update_scale_(scale, tracker, found_inf, growth, backoff, interval)


def end_pool(device: int, pool: tuple[int, int]) -> None:
    """Let a GPU's allocator end a capture that torch could not end. RuntimeError: none goes on in this pool."""
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)


# The dispatcher: a key of spu's own, before autograd, where random draws are met

GENERIC_KEY = "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._dispatch_key_parse(GENERIC_KEY)
_KEYS = torch._C.DispatchKeySet(_KEY)


def is_generic_key_included() -> bool:
    """Return whether operators of this thread go through ``GENERIC_KEY``'s kernels."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_KEY)


def include_generic_key(included: bool) -> None:
    """Let operators of this thread go through ``GENERIC_KEY``'s kernels, or not."""
    torch._C._dispatch_tls_set_dispatch_key_included(_KEY, included)


def without_generic_key() -> Any:
    """Return a context in which operators pass ``GENERIC_KEY`` by."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYS)


def fake_mode_active() -> bool:
    """Return whether a FakeTensorMode is entered on this thread. For: draws that have no values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
