"""When spu's ops may serve a call, and when torch's own must.

The ops know plain tensors: dense memory, one derivative, run now. Everything else that torch's own ops take is theirs:
tensor subclasses (quantised, distributed, nested), sparse layouts, ``torch.func`` transforms, forward-mode derivatives,
and whatever records a program for another runtime (``torch.fx``, ``torch.jit.trace``, ``torch.export``).
"""

from __future__ import annotations

import torch
from torch import Tensor, compiler, nn
from torch.autograd import forward_ad

from spu.common.torch_private import FakeTensor, forward_mode_active, transformed

__all__ = ["fake", "plain", "refuse_derivatives_of_backward", "takes"]

# FakeTensors stand for plain ones: what is planned or compiled on them will run on those.
_TYPES = frozenset((Tensor, nn.Parameter, FakeTensor))
_strided = torch.strided


def plain(*tensors: Tensor | None) -> bool:
    """Tell whether all are torch's own tensors in dense memory, or None: no subclasses, nothing sparse or nested."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TYPES or tensor.layout is not _strided or tensor.is_nested:
            return False
    return True


def takes(*tensors: Tensor | None) -> bool:
    """Tell whether spu's ops may serve a call with these tensors; torch's own ops must serve all others."""
    return plain(*tensors) and not transformed()


def fake(*tensors: Tensor) -> bool:
    """Tell whether one of them is a FakeTensor, so that no values can be read."""
    return FakeTensor in map(type, tensors)  # isinstance would ask torch's metaclass


def refuse_derivatives_of_backward(op: str, dy: Tensor) -> None:
    """Raise RuntimeError where a backward is itself to be differentiated: no op of spu supports that."""
    instead = "use torch's own ops there (spu.restore(model))"
    if torch.is_grad_enabled() and not compiler.is_compiling():
        raise RuntimeError(f"spu.ops.{op} has no second derivative: do not pass create_graph=True, or {instead}")
    if forward_mode_active() and forward_ad.unpack_dual(dy).tangent is not None:
        raise RuntimeError(f"spu.ops.{op} has no forward-mode derivative of its backward: {instead}")
