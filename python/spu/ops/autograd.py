"""The derivative of a fused op: registered for ``torch.compile``, and as an autograd function for eager code.

A registered derivative costs 55 us a call, the autograd function 25 us (plain torch: 6 us). Both save the same tensors
and compute the same gradients: an op gives its two functions to ``FusedOp``, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spu.common.torch_private import BelowAutograd, transformed, will_execute
from spu.ops import schema
from spu.ops.plain import refuse_derivatives_of_backward

__all__ = ["Eager", "Function", "FusedOp", "without_gradient"]


@dataclass(frozen=True, eq=False)
class FusedOp:
    """An op with a derivative in its first tensors, on every backend.

    Attributes:
        name: of the op in ``schema.SCHEMAS``; its first output is the result, the others are for the backward.
        public: its name in ``spu.ops``, for messages.
        operands: how many inputs are tensors; they come first, then the op's options.
        save: ``save(ctx, inputs, outputs, given)`` keeps on ``ctx`` what the backward needs. ``inputs`` are the op's;
            ``given``: its tensors as the caller gave them, from which ``convert`` has made those of ``inputs``.
        gradients: ``gradients(ctx, dy, backend)``: those of the first tensors; None for one that a sink has taken.
        convert: ``convert(*given, *how)``: the op's tensors, for eager code.
    """

    name: str
    public: str
    operands: int
    save: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...], Sequence[Any]], None]
    gradients: Callable[[Any, Tensor, str], tuple[Tensor | None, ...]]
    convert: Callable[..., tuple[Tensor | None, ...]] = lambda *given: given

    def __post_init__(self) -> None:
        for backend in schema.BACKENDS:
            schema.register_autograd(self.name, backend, self._backward(backend), self._setup)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.inputs, ctx.how, ctx.dtypes = len(inputs), (), None
        self.save(ctx, inputs, output, inputs[: self.operands])

    def _backward(self, backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
        def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = ()
            if dy is not None:
                refuse_derivatives_of_backward(self.public, dy)
                found = self.gradients(ctx, dy, backend)
            return (*found, *[None] * (ctx.inputs - len(found)))

        return backward


class Function(torch.autograd.Function):
    """An autograd function for plain tensors. Torch's own ``apply`` looks at each argument for what a transform has
    left behind; without that a call takes 2.4 us less. In a transform it is torch's.

    In its ``backward``, ``ctx.needs_input_grad`` says of which inputs the backward that runs now wants a gradient. Of
    torch's it says which may ever have one: for ``torch.autograd.grad(loss, x)``, and twice in the split backwards of
    zero-bubble schedules, weight gradients would be computed for nobody. Torch's own layers leave them out.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        backward = cls.backward

        @functools.wraps(backward)
        def asked(ctx: Any, *grads: Tensor | None) -> Any:
            ctx.needs_input_grad = _asked(ctx)
            return backward(ctx, *grads)

        cls.backward = staticmethod(asked)  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Compute it, as ``torch.autograd.Function.apply`` without keywords."""
        if transformed():
            return super().apply(*arguments)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class Eager(Function):
    """``apply(*given, op, backend, options, how)``: compute an op in eager code that takes its gradient.

    Args:
        given: the op's tensors, which ``op.convert(*given, *how)`` converts.
        op: a ``FusedOp``.
        options: the op's inputs after the tensors.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, op, backend, options, how = arguments
        ctx.set_materialize_grads(False)
        ctx.op, ctx.backend, ctx.how = op, backend, how
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in given]
        with BelowAutograd():
            inputs = (*op.convert(*given, *how), *options)
            outputs = schema.overload(op.name, backend)(*inputs)
        op.save(ctx, inputs, outputs, given)
        return outputs[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        op, dtypes = ctx.op, ctx.dtypes
        found: tuple[Tensor | None, ...] = ()
        if dy is not None:
            refuse_derivatives_of_backward(op.public, dy)
            found = op.gradients(ctx, dy, ctx.backend)
        each = zip(found, dtypes, strict=False)
        mine = [grad if grad is None or grad.dtype == dtype else grad.to(dtype) for grad, dtype in each]
        return (*mine, *[None] * (len(dtypes) + 4 - len(mine)))


def _asked(ctx: Any) -> tuple[bool, ...]:
    """Return of which arguments the backward that runs now wants a gradient.

    Torch answers of a leaf that ``autograd.grad`` returns by an exception, which takes 25 us. Where two such leaves are
    among the arguments, those after them are taken for wanted: at worst a gradient is computed for nobody.
    """
    if not hasattr(ctx, "may_need"):
        ctx.may_need = ctx.needs_input_grad
    edges = (node for node, _ in ctx.next_functions if node is not None)  # one for each that may need it, in order
    asked, returned = [], 0
    for may in ctx.may_need:
        node = next(edges) if may else None
        known = node is None or (returned > 1 and hasattr(node, "variable"))
        try:
            asked.append(may if known else will_execute(node))
        except RuntimeError:
            returned += 1
            asked.append(True)
    return tuple(asked)


def without_gradient(name: str, backend: str, *inputs: Any) -> Any:
    """Call an op whose results nobody takes a gradient of. In eager code that goes past the registered derivative,
    which is Python and takes 10 us to find that out; a token makes six such calls in each layer of a decoder.
    """
    op = schema.overload(name, backend)
    if torch.compiler.is_compiling():
        return op(*inputs)
    with BelowAutograd():
        return op(*inputs)
