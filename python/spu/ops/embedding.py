"""``embedding``: torch's, with a gradient that goes straight to the rows of the fp32 main gradient that were looked up.

Torch's own backward makes a gradient of the whole table for each microbatch, in the storage dtype; then it is widened,
unscaled and added. Here only the rows that have an id are touched:

    main_grad[i] (+)= inv_scale * sum of dy[t] over the tokens t with ids[t] = i      fp32, in the order of the tokens

The order does not depend on threads or on the device's scheduling, so results are the same on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spu.common.dtypes import STORAGE
from spu.common.torch_private import BelowAutograd
from spu.ops import schema
from spu.ops.autograd import Function
from spu.ops.dispatch import choose_backend, has_kernel
from spu.ops.plain import refuse_derivatives_of_backward, takes
from spu.ops.sink import MainGrad, sinks_of

__all__ = ["embedding", "embedding_dw_"]

_IDS = (torch.int64, torch.int32)


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int, backend: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.parameter = weight if weight.is_leaf else None
        ctx.how = weight.shape[0], padding_idx, backend
        with BelowAutograd():  # torch.embedding gives a view of its rows, which nobody could change in place then
            width = weight.shape[1]
            rows = weight.new_empty((*ids.shape, width))
            torch.index_select(weight, 0, ids.reshape(-1), out=rows.view(ids.numel(), width))
            return rows

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return None, None, None, None
        refuse_derivatives_of_backward("embedding", dy)
        (ids,), (entries, padding_idx, backend) = ctx.saved_tensors, ctx.how
        (sink,) = sinks_of(ctx, (ctx.parameter,))
        if sink is not None:
            sink.embedding_weight(dy, ids, padding_idx, backend)
            return None, None, None, None
        dw = torch.ops.aten.embedding_dense_backward(dy, ids, entries, padding_idx, False)
        return dw, None, None, None


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Look up rows: weight[ids].

    Args:
        ids: int64 or int32 [...], in [0, V).
        weight: [V, C]; fp16, bf16 or fp32 (others: torch's own op serves).
        padding_idx: an entry that gets no gradient; negative ones count from the end. (Torch's other options, which
            rescale or renormalise rows or make sparse gradients, are left to ``F.embedding``.)

    Returns:
        [..., C] in the dtype of ``weight``. Differentiable once in ``weight``; inside a loss scale's scope the
        parameter's sink takes the gradient. Torch's own op serves what ``linear_act`` leaves to it, ``torch.compile``,
        and the reference backend.

    Raises:
        ValueError: a padding_idx outside [-V, V).
    """
    if not takes(ids, weight):
        return F.embedding(ids, weight, padding_idx)
    learns = weight.requires_grad and torch.is_grad_enabled()
    if not learns or weight.dim() != 2 or weight.dtype not in STORAGE or torch.compiler.is_compiling():
        return F.embedding(ids, weight, padding_idx)
    entries = weight.shape[0]
    if padding_idx is not None and not -entries <= padding_idx < entries:
        raise ValueError(f"embedding: padding_idx {padding_idx} is not in [{-entries}, {entries})")
    if ids.device != weight.device or ids.dtype not in _IDS:  # torch's op says what is wrong
        return F.embedding(ids, weight, padding_idx)
    backend = choose_backend(weight)
    if backend == "reference" or not has_kernel("embedding_dw_", backend):
        return F.embedding(ids, weight, padding_idx)
    left_out = -1 if padding_idx is None else padding_idx % entries
    return _Embedding.apply(weight, ids.long(), left_out, backend)  # type: ignore[no-any-return]


def embedding_dw_(dy: Tensor, ids: Tensor, padding_idx: int, into: MainGrad, *, backend: str | None = None) -> None:
    """Compute main_grad [V, C] (+)= inv_scale * the sum, for each entry, of the rows of dy [..., C] with its id; -1 for
    no ``padding_idx``. For gradient sinks.
    """
    schema.overload("embedding_dw_", backend or choose_backend(dy))(dy, ids, padding_idx, *into)
