"""The dtypes of a 16-bit precision: of parameters, and of the operands of products. All else keeps its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from spu.common import torch_private
from spu.common.dtypes import HALVES
from spu.common.torch_private import pytree

__all__ = ["convert_state", "is_mixed", "products_in", "state_dtypes"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, torch_private.NormBase)


def state_dtypes(modules: Iterable[nn.Module], dtype: torch.dtype) -> dict[int, torch.dtype]:
    """Return the dtype that each parameter or buffer has in training, by id; those that are missing keep their own.

    Floating-point parameters get ``dtype``. Those of normalisations stay fp32, and so do their running statistics:
    torch's kernels take 16-bit rows beside them. Other buffers (positions, masks, constants, complex ones) are left
    alone, but where the whole model was converted (``model.double()``): a buffer of its parameters' dtype becomes fp32.

    Args:
        modules: the model's, whole: each part once or more often, submodules are found.
        dtype: of the training.
    """
    all_modules = {id(m): m for top in modules for m in top.modules()}.values()
    converted = {p.dtype for m in all_modules for p in torch_private.parameters_of(m).values() if p is not None}
    converted -= {torch.float32, dtype}
    found: dict[int, torch.dtype] = {}
    for module in all_modules:
        is_norm = isinstance(module, _NORMS)
        for parameter in torch_private.parameters_of(module).values():
            if parameter is not None and parameter.is_floating_point():
                found[id(parameter)] = torch.float32 if is_norm else dtype
        for buffer in torch_private.buffers_of(module).values():
            if buffer is not None and buffer.is_floating_point() and (is_norm or buffer.dtype in converted):
                found[id(buffer)] = torch.float32
    return found


def convert_state(modules: Iterable[nn.Module], dtypes: dict[int, torch.dtype]) -> None:
    """Convert parameters, gradients with them, and buffers in place, to what ``state_dtypes`` says."""
    for module in {id(m): m for top in modules for m in top.modules()}.values():
        for parameter in torch_private.parameters_of(module).values():
            if parameter is None or dtypes.get(id(parameter), parameter.dtype) == parameter.dtype:
                continue
            parameter.data = parameter.data.to(dtypes[id(parameter)])
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(parameter.dtype)
        for buffer in torch_private.buffers_of(module).values():
            if buffer is not None and id(buffer) in dtypes:
                buffer.data = buffer.data.to(dtypes[id(buffer)])


def is_mixed(module: nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether operations of a module, given tensors in ``dtype``, may meet others: see ``_Widening``."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):  # its short cut in evaluation wants one dtype everywhere
            return True
        if _names_of(type(part)) & _FP32_NAMES:  # type: ignore[arg-type]  # mypy: a class has no hash of its own
            return True
        own = (
            t
            for t in (*torch_private.parameters_of(part).values(), *torch_private.buffers_of(part).values())
            if t is not None
        )
        if not isinstance(part, _NORMS) and any(t.is_floating_point() and t.dtype != dtype for t in own):
            return True
    return False


@lru_cache(maxsize=4096)
def _names_of(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names that the code of a module's class uses, and that of the functions which it calls by name."""
    names: set[str] = set()
    seen: set[CodeType] = set()
    bases = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    left = [f for base in bases for f in vars(base).values() if isinstance(f, FunctionType)]
    while left:
        function = left.pop()
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            if code in seen:
                continue
            seen.add(code)
            names.update(code.co_names)
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
            called = [function.__globals__.get(name) for name in code.co_names]
            left += [f for f in called if isinstance(f, FunctionType) and not f.__module__.startswith("torch")]
    return frozenset(names)


@contextmanager
def products_in(dtype: torch.dtype, mixed: bool, given: Any) -> Iterator[None]:
    """Run a layer in a 16-bit precision inside: products cast their operands to ``dtype``, as under ``torch.autocast``.

    Weights are in it already, so that no cast is worth caching.

    Args:
        mixed: the layer has state of other dtypes.
        given: the layer's input.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    mixed = mixed or any(leaf.is_floating_point() and leaf.dtype != dtype for leaf in leaves)
    device = "cuda" if any(leaf.is_cuda for leaf in leaves) else "cpu"
    with torch.autocast(device, dtype, cache_enabled=False), _Widening() if mixed else nullcontext():
        yield


class _Widening(TorchFunctionMode):
    """Makes operations that want their tensors in one dtype, and that autocast leaves alone, take the widest of them,
    and some of matrices fp32, as autocast does with their like.

    Under autocast 16-bit parameters do not exist, so that these meet fp32 alone. It costs 1 us an operation, and is
    entered only where dtypes are mixed, or a module's code has the name of such an operation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in torch_private.RECURRENT:  # torch's fp16 LSTM takes no fp32 input under autocast on a CPU
            dtype = args[2][0].dtype if isinstance(args[2], (tuple, list)) else args[3][0].dtype
            args, kwargs = _cast((args, kwargs), dtype)
        elif func in _WANT_FP32:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _widened, (args, kwargs))
        elif func in _WANT_ONE_DTYPE:
            dtypes = {t.dtype for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            floats = [dtype for dtype in dtypes if dtype.is_floating_point]
            if len(floats) > 1:
                args, kwargs = _cast((args, kwargs), max(floats, key=lambda dtype: dtype.itemsize))
        return func(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


# Without 16-bit kernels, but for matrix_exp, whose values and gradients are wrong there (findings/matrix_exp_16bit.sh).
_FP32_NAMES = frozenset(
    ("matrix_exp", "det", "logdet", "slogdet", "lu", "lu_factor", "lu_factor_ex", "solve_triangular", "matrix_norm")
)
_WANT_FP32 = frozenset(
    getattr(place, name)
    for place in (torch, torch.Tensor, torch.linalg)
    for name in _FP32_NAMES
    if hasattr(place, name)
)
_WANT_ONE_DTYPE = frozenset(
    {
        *(F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.bilinear, F.embedding_bag, F.prelu),
        *(torch.layer_norm, torch.group_norm, torch.batch_norm, torch.instance_norm, torch.bilinear, torch.prelu),
        *(torch.lerp, torch.Tensor.lerp, torch.dot, torch.Tensor.dot, torch.vdot, torch.Tensor.vdot),
        *(torch.mv, torch.Tensor.mv, torch.addmv, torch.Tensor.addmv, torch.inner, torch.Tensor.inner),
        *(torch.addr, torch.Tensor.addr, torch.ger, torch.Tensor.ger, torch.tensordot, torch.linalg.multi_dot),
    }
)
