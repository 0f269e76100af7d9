"""A check that the weighted losses of microbatches have the gradients of the whole batch's loss.

The divisor of a user's function cannot be read from its code. So the function is called on real outputs of some steps.
The gradient of the whole batch's loss must be, row by row, each microbatch's own gradient times its share (losses
alone are no evidence: at the start of training they are nearly equal in all microbatches). The calls leave no trace in
the loss's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.quiet import hushed
from spu.common.torch_private import pytree
from spu.engine.loss import Weighing, loss_of, widened
from spu.engine.microbatch import batch_rows, join_rows
from spu.model.randomness import LayerRandomness
from spu.model.untouched import untouched

__all__ = ["LossCheck"]

_BYTES = 1 << 24  # of outputs that are checked; rows of the first two microbatches in any case
_REFUSAL = (
    "loss_fn cannot be computed by microbatches as it is: microbatch {index} has {share:.4g} of the batch's targets, "
    "but counts {found:.4g} in the whole batch's loss, or its rows act on other microbatches, or it is NaN. "
    "Say what the mean divides by with loss_weight=function of the targets (for class weights: "
    "lambda y: weight[y].sum()), or loss_weight='sum' for a loss that adds up over rows; or train with microbatches=1"
)
_OWN = (
    "loss_fn cannot be computed by microbatches as it is: its parameter of shape {shape} gets another gradient from "
    "{parts} microbatches (of norm {found:.4g}) than from the whole batch ({wanted:.4g}). A term of parameters alone, "
    "such as a penalty, counts once for each microbatch where losses add up (reduction='sum'): leave it to the "
    "optimizer's weight_decay, return a mean, or train with microbatches=1"
)
_UNCHECKED = (
    "whether loss_fn may be computed by microbatches could not be checked ({why}): each microbatch is weighed by its "
    "counted targets. Say what the mean divides by with loss_weight=function of the targets, or loss_weight='sum'"
)
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative, of a loss that rounds to 16 bits; others: 1e-3


class LossCheck:
    """Collects outputs and targets in the steps 1, 2, 4, 8, ..., and checks them at the end of each.

    Args:
        loss_fn: the user's.
        weighing: the weights to check.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], torch.Tensor], weighing: Weighing) -> None:
        self._loss_fn = loss_fn
        self._weighing = weighing
        self._batches = 0
        self._seen: list[tuple[Any, Any]] = []
        self._bytes = 0
        self._counted = False  # whether the present batch is one of `_batches`
        self._warned = False

    def begin(self, parts: int) -> bool:
        """Begin a batch; tell whether the loss's arguments must be passed to :meth:`add`."""
        self._seen, self._bytes, self._counted = [], 0, False
        if self._weighing.known or parts < 2:
            return False
        self._batches, self._counted = self._batches + 1, True
        return self._batches & (self._batches - 1) == 0

    def add(self, outputs: Any, targets: Any) -> None:
        """Copy some rows of the arguments of one microbatch's loss."""
        if self._bytes >= _BYTES and len(self._seen) >= 2:
            return
        rows = batch_rows(targets)
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        kept = max(1, min(rows, (_BYTES - self._bytes) * rows // max(size, 1)))

        def some(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, nn.Parameter):  # a head's weight, for a loss that computes the logits
                return tensor
            return (tensor[:kept] if _has(tensor, rows) else tensor).detach().clone()

        self._seen.append(pytree.tree_map_only(torch.Tensor, some, (outputs, targets)))
        self._bytes += size * kept // rows

    def cancel(self) -> None:
        """Forget a batch that has failed, as if it had not begun."""
        self._batches -= self._counted
        self._seen, self._bytes, self._counted = [], 0, False

    def end(self) -> None:
        """End the batch and check the collected rows.

        Raises:
            ValueError: the loss is not such a mean.
        """
        seen, self._seen = self._seen, []
        if len(seen) == 1:  # the others are in other pipelines: the same law holds for parts of this one
            seen = _halves(*seen[0])
        if len(seen) < 2:
            return
        whole = _joined(seen)
        if whole is None:
            self._warn("its arguments cannot be joined to those of the whole batch")
            return
        try:
            with (
                untouched(self._loss_fn, values=True),
                hushed(),
                torch.inference_mode(False),
                torch.enable_grad(),
                LayerRandomness(0, 0, 0, "loss") as draws,
            ):
                dtypes = set[torch.dtype]()
                parts, own_parts = zip(*(self._gradients(*part, dtypes) for part in seen), strict=True)
                together, own_together = self._gradients(*whole, dtypes)
        except Exception as error:  # not made for these rows: there is no loss of the whole batch to compare with
            self._warn(f"calling it on some rows of the whole batch raised {type(error).__name__}: {error}")
            return
        shares = self._weighing.shares([targets for _, targets in seen])
        parts = tuple(part if share != 0 else torch.zeros_like(part) for part, share in zip(parts, shares, strict=True))
        if draws.draws:
            self._warn("it draws random numbers")
        if draws.draws or not together.isfinite().all():
            return
        allowed = max((_TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-3) * together.norm()
        least = max((_least(dtype) for dtype in dtypes if dtype.is_floating_point), default=0.0)
        own = together.split([len(part) for part in parts])
        for index, (part, share, wanted) in enumerate(zip(parts, shares, own, strict=True)):
            rounding = least * part.numel() ** 0.5
            if not (wanted - part * share.to(part)).norm() <= allowed + rounding:  # NaN too
                found = float((wanted * part).sum() / (part * part).sum())
                raise ValueError(_REFUSAL.format(index=index, share=float(share), found=found))
        _check_own(own_parts, own_together, [float(share) for share in shares], dtypes)

    def _warn(self, why: str) -> None:
        if not self._warned:
            warnings.warn(_UNCHECKED.format(why=why), stacklevel=2)
        self._warned = True

    def _gradients(
        self, outputs: Any, targets: Any, dtypes: set[torch.dtype]
    ) -> tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
        """Return the loss's gradients in all outputs that have rows, fp64 [rows, elements], and in small parameters.

        The outputs are what the loss is given (fp32, unless it takes raw outputs), so that what a check allows for 16
        bits is allowed only where the loss itself rounds to them. The dtypes that the gradient goes through join
        ``dtypes``.
        """
        rows = batch_rows(targets)
        leaves, spec = pytree.tree_flatten(outputs)
        leaves = [
            widened(self._loss_fn, leaf).clone().requires_grad_(leaf.is_floating_point()) if _has(leaf, rows) else leaf
            for leaf in leaves
        ]
        wanted = [leaf for leaf in leaves if _has(leaf, rows) and leaf.requires_grad]
        loss = loss_of(self._loss_fn, pytree.tree_unflatten(leaves, spec), targets)
        dtypes.update(leaf.dtype for leaf in wanted)
        with _noted(loss, dtypes) as reached:
            own = [leaf for leaf in reached if not any(leaf is other for other in wanted)]
            found = torch.autograd.grad(loss, [*wanted, *own], allow_unused=True, materialize_grads=True)
        of_rows = [
            gradient.double().flatten(1) if gradient.dim() > 1 else gradient.double()[:, None]
            for gradient in found[: len(wanted)]
        ]
        return torch.cat(of_rows, 1), dict(zip(own, found[len(wanted) :], strict=True))


@contextmanager
def _noted(loss: torch.Tensor, dtypes: set[torch.dtype]) -> Iterator[list[torch.Tensor]]:
    """Let a backward of ``loss`` add the dtypes of all gradients between to ``dtypes``.

    Yields:
        The leaves that it reaches, but for large ones, and those with hooks, which are not to be called.
    """

    def note(gradients: tuple[torch.Tensor | None, ...]) -> None:
        dtypes.update(gradient.dtype for gradient in gradients if gradient is not None)

    nodes, seen, hooks, leaves = [loss.grad_fn], set[Any](), list[Any](), list[torch.Tensor]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):  # no hook on its node, which may outlive this loss
            if leaf.numel() * leaf.element_size() <= _BYTES and not torch_private.backward_hooks(leaf):
                leaves.append(leaf)
        else:
            hooks.append(node.register_prehook(note))
            nodes.extend(edge for edge, _ in node.next_functions)
    try:
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def _check_own(
    parts: Sequence[dict[torch.Tensor, torch.Tensor]],
    together: dict[torch.Tensor, torch.Tensor],
    shares: Sequence[float],
    dtypes: set[torch.dtype],
) -> None:
    """Raise ValueError if a parameter's gradients in microbatches, each times its share, do not add up."""
    for leaf, wanted in together.items():
        if not any(leaf in part for part in parts):  # made by each call
            continue
        scaled = [
            part[leaf].double() * share for part, share in zip(parts, shares, strict=True) if share and leaf in part
        ]
        found = torch.stack([torch.zeros_like(wanted, dtype=torch.float64), *scaled]).sum(0)
        size = sum(float(one.norm()) for one in scaled) + float(wanted.norm())
        allowed = max(_TOLERANCE.get(dtype, 1e-3) for dtype in {leaf.dtype, *dtypes}) * size
        if size < float("inf") and not (found - wanted).norm() <= allowed + _least(leaf.dtype) * leaf.numel() ** 0.5:
            raise ValueError(
                _OWN.format(
                    shape=tuple(leaf.shape), parts=len(parts), found=float(found.norm()), wanted=float(wanted.norm())
                )
            )


def _least(dtype: torch.dtype) -> float:
    """Return the spacing of the smallest numbers: what two roundings to 16 bits can take from a gradient, whose whole
    range may lie there once a model has learnt its data (no loss scale is applied here).
    """
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _has(leaf: Any, rows: int) -> bool:
    own = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows
    return own and not isinstance(leaf, nn.Parameter)


def _halves(outputs: Any, targets: Any) -> list[tuple[Any, Any]]:
    """Return a microbatch as two, divided along its rows; nothing if it has one row."""
    rows = batch_rows(targets)

    def half(part: slice) -> tuple[Any, Any]:
        return pytree.tree_map(lambda leaf: leaf[part] if _has(leaf, rows) else leaf, (outputs, targets))  # type: ignore

    return [half(slice(0, rows // 2)), half(slice(rows // 2, None))] if rows > 1 else []


def _joined(seen: list[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """Return all microbatches as one, joined along their rows; None if that is impossible."""
    sizes = [batch_rows(targets) for _, targets in seen]
    flat = [pytree.tree_flatten(part) for part in seen]
    joined = []
    for column in zip(*(leaves for leaves, _ in flat)):
        if all(_has(leaf, rows) for leaf, rows in zip(column, sizes)):
            if len({leaf.shape[1:] for leaf in column}) > 1:
                return None
            joined.append(join_rows(*column))
        elif isinstance(column[0], torch.Tensor) and not all(torch.equal(leaf, column[0]) for leaf in column):
            return None  # a value of each microbatch's own, such as a router's loss
        else:
            joined.append(column[0])
    outputs, targets = pytree.tree_unflatten(joined, flat[0][1])
    return outputs, targets
