"""The gradients of a vocabulary projection's operands from those of its logits, for some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spu.common.dtypes import HALVES
from spu.ops import schema
from spu.ops.linear import linear_dw_
from spu.ops.sink import MainGrad, at_once, sinks_of

__all__ = ["spread"]

_SUM_BYTES = 1 << 20  # of fp32 sums of a weight gradient of 16 bits at a time


class _PlainWeightGradient:
    """The sum of factor * dz.T @ x over chunks, rounded once to ``dtype``."""

    def __init__(self, weight: Tensor, backend: str, dtype: torch.dtype, factor: Tensor | None) -> None:
        self._weight, self._backend, self._dtype = weight, backend, dtype
        if factor is None:
            factor = torch.ones(1, dtype=torch.float32, device=weight.device)
        self._factor = factor
        self._total: Tensor | None = None

    def _into(self, total: Tensor, dz: Tensor, x: Tensor, accumulate: bool) -> None:
        into = MainGrad(total, self._factor, torch.zeros_like(self._factor), accumulate)
        linear_dw_(dz, x, into, backend=self._backend)

    def add(self, dz: Tensor, x: Tensor) -> None:
        if self._weight.dtype == torch.float64:
            part = schema.overload("linear_dw", self._backend)(dz, x) * self._factor
            self._total = part if self._total is None else self._total + part
            return
        accumulate = self._total is not None
        if self._total is None:
            self._total = torch.empty(self._weight.shape, dtype=torch.float32, device=dz.device)
        self._into(self._total, dz, x, accumulate)

    def result(self) -> Tensor:
        total = torch.zeros_like(self._weight) if self._total is None else self._total
        return total.to(self._dtype)

    def of_all(self, dz: Tensor, x: Tensor) -> Tensor:
        """Return the result for the only chunk.

        On a CPU. fp32: the factor goes into x, for a plain product (on AVX-512 120 ms instead of 200, 64 rows, 92,544
        words, width 512). 16 bits: some words at a time, whose sums stay in the cache, so that no fp32 gradient of the
        whole weight exists beside.
        """
        if dz.is_cpu and dz.dtype == self._dtype == torch.float32:
            return schema.overload("linear_dw", self._backend)(dz, x * self._factor)  # type: ignore[no-any-return]
        if self._dtype not in HALVES or not dz.is_cpu:
            self.add(dz, x)
            return self.result()
        (vocabulary, width), dw = self._weight.shape, torch.empty(self._weight.shape, dtype=self._dtype, device="cpu")
        words = max(1, _SUM_BYTES // (4 * max(1, width)))
        sums = torch.empty(min(words, vocabulary), width, dtype=torch.float32, device="cpu")
        for first in range(0, vocabulary, words):
            some = sums[: min(words, vocabulary - first)]
            self._into(some, dz[:, first : first + words], x, False)
            dw[first : first + words] = some
        return dw


class _InputGradient:
    """The rows of factor * dz @ weight, rounded once to ``dtype``."""

    def __init__(self, hidden: Tensor, weight: Tensor, backend: str, dtype: torch.dtype, factor: Tensor | None) -> None:
        self._like, self._weight, self._backend, self._dtype, self._factor = hidden, weight, backend, dtype, factor
        self._pieces: list[Tensor] = []

    def add(self, dz: Tensor) -> None:
        if self._factor is None or dz.dtype == torch.float64:
            piece = schema.overload("linear_dx", self._backend)(dz, self._weight)
            self._pieces.append(piece if self._factor is None else piece * self._factor)
            return
        if self._dtype == dz.dtype == torch.float32 and dz.is_cpu:  # as exact: the factor multiplies the same sums
            self._pieces.append(schema.overload("linear_dx", self._backend)(dz, self._weight).mul_(self._factor))
            return
        piece = torch.empty(dz.shape[0], self._weight.shape[1], dtype=torch.float32, device=dz.device)
        into = MainGrad(piece, self._factor, torch.zeros_like(self._factor), False)
        linear_dw_(dz.t(), self._weight, into, backend=self._backend)
        self._pieces.append(piece.to(self._dtype))

    def result(self) -> Tensor:
        if not self._pieces:
            return torch.zeros_like(self._like)
        return self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces)


def spread(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    backend: str,
    parts: Sequence[slice],
    dz_of: Callable[[slice], Tensor],
    factor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and weight, None for one that a sink has taken, from those of some rows' logits at
    a time, ``dz_of(part)``; both times ``factor``, fp32 [1] (None: 1).
    """
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    dtypes = ctx.dtypes or (hidden.dtype, weight.dtype)
    (sink,) = sinks_of(ctx, (ctx.parameter,))
    plain = _PlainWeightGradient(weight, backend, dtypes[1], factor) if needs_weight and sink is None else None
    dhidden = _InputGradient(hidden, weight, backend, dtypes[0], factor) if needs_hidden else None
    dweight: Tensor | None = None
    for part in parts:
        x, dz = hidden if len(parts) == 1 else hidden[part], dz_of(part)
        if dhidden is not None:
            dhidden.add(dz)
        if sink is not None:
            with at_once(factor):  # deferred work would keep the logit gradients of all pieces
                sink.linear_weight(dz, x, backend)
        elif plain is not None and len(parts) == 1:
            dweight = plain.of_all(dz, x)
        elif plain is not None:
            plain.add(dz, x)
        del dz  # before the next rows' are made
    if plain is not None and dweight is None:
        dweight = plain.result()
    return None if dhidden is None else dhidden.result(), dweight
