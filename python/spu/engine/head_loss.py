"""The loss of a model that ends in a linear head, computed without its logits.

A language model's logits, [tokens, vocabulary] in fp32, are often the largest tensor of a step. Where the last layer
ends in a linear head, and the loss is a mean cross-entropy of what the head returns, the last stage stops before the
head's product, and `spu.ops.linear_cross_entropy` computes product and loss for some rows at a time. Losses and
gradients are then the plain ones within that op's error bound (docs/numerics.md). In a training the loss is made
together with its gradients, in the backward, so that logits are made once (``cross_entropy_share``).

Everything else goes the plain way, bit for bit as if this file did not exist:

- small logits (`WORTH_BYTES`), and calls that the op's reference backend would serve, or that only torch's ops take;
- outputs that are wanted themselves: ``forward_backward(keep_outputs=True)``, a loss that is being checked;
- a head with a bias, an activation, a hook, a parametrization, a forward or a precision of its own, and a last layer
  with a hook or with anything after the head;
- a loss with class weights, label smoothing or another reduction, of raw outputs, or of the user's own making.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spu.common.dtypes import STORAGE
from spu.common.torch_private import children_of, has_global_module_hook
from spu.engine.loss import PlainCrossEntropy, loss_of, plain_cross_entropy
from spu.model.huggingface import Head
from spu.model.layers import Layer
from spu.model.traced_part import Part
from spu.nn.blocks import unwatched
from spu.nn.linear import Linear
from spu.ops import linear_cross_entropy
from spu.ops.cross_entropy import cross_entropy_share
from spu.ops.dispatch import choose_backend
from spu.ops.linear import compute_dtype
from spu.ops.plain import takes

__all__ = ["WORTH_BYTES", "HeadInput", "HeadLoss", "ends_in_loss", "head_of", "worth_bytes"]

WORTH_BYTES = 16 << 20
"""Bytes of a microbatch's logits in fp32 from which on they are left out, where products are of 16 bits.

Head and loss alone took 1.06 to 1.09 times as long in the plain way from here on in fp16 (512 rows, 8,192 words, hidden
sizes 512 and 1,024; 1,024 rows: 1.4 times), and as long below (0.98 to 1.04 at 2 to 8 MiB): processor time of one
AVX-512 thread, best of 5 to 9 in turns, on a busy machine. A step's peak falls by twice the logits
(docs/performance.md).
"""

_FP32_FACTOR = 4
"""How many times larger logits of fp32 products must be: there is no widened copy to be saved. Measured in the same
way, the plain one took 0.90 to 1.00 times as long at 2 to 16 MiB, and 1.02 and 1.01 at 32 and 64 MiB."""


def worth_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of a microbatch's fp32 logits from which on they are left out, by the dtype of the product."""
    return WORTH_BYTES * (_FP32_FACTOR if dtype == torch.float32 else 1)


class HeadInput(NamedTuple):
    """What the last stage gives to its loss in place of logits.

    Attributes:
        hidden: what the head would multiply, [..., in].
        weight: the head's, [vocabulary, in].
    """

    hidden: Tensor
    weight: Tensor


def head_of(module: nn.Module) -> nn.Linear | None:
    """Return the plain linear head that a last layer ends in; None if it ends otherwise, or somebody watches it."""
    head: nn.Module | None = module
    if isinstance(module, Head | Part):
        head = module.head
    elif getattr(type(module), "spu_plain", type(module)) is nn.Sequential:
        head = next(reversed(children_of(module).values()), None)
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, Linear):
        return None
    if not unwatched(module) or not unwatched(head):
        return None
    own = getattr(head, "activation", "none") != "none" or getattr(head, "spu_dtype", None) is not None
    return None if own or head.bias is not None or has_global_module_hook() else head


def ends_in_loss(module: nn.Module, loss_fn: Any) -> bool:
    """Tell whether a last layer and a loss may be computed together, without logits, where these are large."""
    return plain_cross_entropy(loss_fn) is not None and head_of(module) is not None


@dataclass
class HeadLoss(Layer):
    """The last layer, run up to its head's product, and the loss, which computes that product.

    Attributes:
        loss_fn: the last stage's.
    """

    loss_fn: Any = None

    @staticmethod
    def of(layer: Layer, loss_fn: Any) -> HeadLoss:
        """Return it for the last layer of a model."""
        return HeadLoss(layer.name, layer.module, layer.wants_inputs, layer.parameter_names, layer.products, loss_fn)

    def _call(self, x: Any, inputs: Any) -> Any:
        """Return a `HeadInput`, or the layer's own outputs where the plain way is taken."""
        loss, head = plain_cross_entropy(self.loss_fn), head_of(self.module)
        if loss is None or head is None:
            return super()._call(x, inputs)
        if isinstance(self.module, Head):
            if not _is_large(x, head.weight):
                return super()._call(x, inputs)
            hidden, ends = self.module.until_head(x, inputs)
            if not ends:
                return hidden
        elif isinstance(self.module, Part):
            hidden = self.module.until_head(x)
        elif isinstance(self.module, nn.Sequential):
            hidden = type(self.module)(*list(self.module)[:-1])(x)
        else:
            hidden = x
        return HeadInput(hidden, head.weight) if _is_worth_it(hidden, head.weight, loss) else head(hidden)

    def loss(self, given: HeadInput, targets: Any) -> Tensor:
        """Return ``loss_fn(logits, targets)``; raise what that raises for targets that do not fit the logits."""
        operands, head = self._operands(given, targets), head_of(self.module)
        assert head is not None
        with self.in_precision(given.hidden):
            if operands is not None:
                return linear_cross_entropy(*operands)
            logits = head(given.hidden)
        return loss_of(self.loss_fn, logits, targets)

    def share(self, given: HeadInput, targets: Any, factor: float | Tensor) -> Tensor | None:
        """Return factor * ``loss(given, targets)``, NaN until its backward has run; None where only ``loss`` serves."""
        operands = self._operands(given, targets)
        if operands is None:
            return None
        rows, weight, labels, ignore_index = operands
        with self.in_precision(given.hidden):
            return cross_entropy_share(rows, weight, labels, factor, ignore_index)

    def _operands(self, given: HeadInput, targets: Any) -> tuple[Tensor, Tensor, Tensor, int] | None:
        """Return hidden, weight, labels and ignore_index for the op; None for targets that do not fit it."""
        loss = plain_cross_entropy(self.loss_fn)
        assert loss is not None
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
            return None
        labels, rows = targets.flatten() if loss.any_rows else targets, given.hidden.flatten(0, -2)
        return (rows, given.weight, labels, loss.ignore_index) if labels.shape == rows.shape[:1] else None


def _is_worth_it(hidden: Any, weight: Tensor, loss: PlainCrossEntropy) -> bool:
    """Tell whether the op can serve the product of ``hidden`` and the head's weight, and should."""
    if not isinstance(hidden, Tensor) or not takes(hidden, weight) or hidden.device != weight.device:
        return False
    cast = compute_dtype(hidden, None)
    dtype = hidden.dtype if cast is None else cast
    if dtype not in STORAGE or (cast is None and weight.dtype != dtype):
        return False
    if not _is_large(hidden, weight) or not (loss.any_rows or hidden.dim() == 2) or hidden.shape[-1] != weight.shape[1]:
        return False
    shape = (hidden.numel() // hidden.shape[-1], *weight.shape)
    return choose_backend(hidden, dtype, op="linear_ce", shape=shape) != "reference"


def _is_large(hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether the logits of ``hidden`` [..., in] take `worth_bytes` in fp32."""
    rows = hidden.numel() // max(1, hidden.shape[-1]) if hidden.dim() > 1 else 0
    least = worth_bytes(compute_dtype(hidden, None) or hidden.dtype)
    return rows * weight.shape[0] * torch.float32.itemsize >= max(1, least)
