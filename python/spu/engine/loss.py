"""The loss: the default one, its inputs and parameters, and the divisor of its mean.

A microbatch counts as much as its part of the divisor: the mean over a batch is the sum of its microbatches' means,
each times its share. For torch's losses the divisor is known, by the table here; for any other it is taken to be the
number of targets that are not ``ignore_index``, which `spu.engine.loss_check` compares with the loss itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from spu.common import torch_private
from spu.common.dtypes import HALVES
from spu.common.moves import move_module
from spu.common.torch_private import pytree
from spu.engine.microbatch import count_each, count_targets, shares_of, target_weights
from spu.model.layers import Layer
from spu.nn.blocks import unwatched
from spu.ops.optimizer import on_device

__all__ = [
    "SUM",
    "OnRawOutputs",
    "PlainCrossEntropy",
    "Weighing",
    "check_rows",
    "cross_entropy",
    "loss_of",
    "loss_part",
    "move_loss",
    "plain_cross_entropy",
    "weighing_of",
    "widened",
]

SUM = "sum"  # a loss_weight: losses of microbatches add up as they are


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy in fp32: the default loss.

    Args:
        outputs: logits [..., classes].
        targets: class indices int64 [...]; -100 is not counted.
    """
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


class OnRawOutputs(functools.partial):  # type: ignore[type-arg]
    """A loss that takes the model's outputs in their own dtype."""


def loss_of(loss_fn: Callable[[Any, Any], torch.Tensor], outputs: Any, targets: Any) -> torch.Tensor:
    """Return the loss of a microbatch.

    16-bit outputs are converted to fp32: a sum over rows would overflow, or stop growing, in 16 bits.
    """
    return loss_fn(widened(loss_fn, outputs), targets)


def widened(loss_fn: Any, outputs: Any) -> Any:
    """Return a model's outputs as a loss is given them: 16-bit ones in fp32, unless it takes them raw."""
    if isinstance(loss_fn, OnRawOutputs):
        return outputs
    return _wide(outputs) if isinstance(outputs, torch.Tensor) else pytree.tree_map_only(torch.Tensor, _wide, outputs)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


# A loss with parameters


def loss_part(loss_fn: Any, layers: Iterable[Layer]) -> Layer | None:
    """Return a loss that is a module, or a method or partial of one, as a layer that the last stage trains.

    Returns:
        None if it has no parameters to train, or holds the model itself.

    Raises:
        ValueError: it holds both layers of the model and parameters of its own.
    """
    found = _modules_of(loss_fn)
    holder = found[0] if len(found) == 1 else nn.ModuleList(found)
    if not any(p.requires_grad for p in holder.parameters()):
        return None
    modules = [m for layer in layers for m in layer.module.modules()]
    within = {id(m) for m in modules if torch_private.parameters_of(m) or torch_private.buffers_of(m)}
    if any(id(m) in within for m in holder.modules()):
        known = {id(p) for m in modules for p in torch_private.parameters_of(m).values()}
        own = [name for name, p in holder.named_parameters() if id(p) not in known and p.requires_grad]
        if own:
            raise ValueError(
                f"loss_fn holds layers of the model, and {own[0]!r}, which is none of theirs and would not be trained: "
                "give loss_fn its own parameters only (a single parameter of the model may be among them)"
            )
        return None
    return Layer("loss_fn", holder)


def move_loss(loss_fn: Any, device: torch.device) -> None:
    """Move a loss's parameters and buffers to the device that computes it."""
    for module in _modules_of(loss_fn):
        move_module(module, device)


def _modules_of(loss_fn: Any) -> list[nn.Module]:
    if isinstance(loss_fn, nn.Module):
        return [loss_fn]
    if isinstance(loss_fn, functools.partial):
        inner = _modules_of(loss_fn.func)
        given = [v for v in (*loss_fn.args, *loss_fn.keywords.values()) if isinstance(v, nn.Module)]
        return list({id(m): m for m in [*inner, *given]}.values())
    owner = getattr(loss_fn, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


# The divisor of a mean


@dataclass(frozen=True)
class _Setting:
    """A loss's settings, from keywords of a partial or from attributes, which are read each time."""

    given: dict[str, Any]
    owner: Any

    def __call__(self, name: str, default: Any = None) -> Any:
        return self.given.get(name, getattr(self.owner, name, default))


def _classes(targets: torch.Tensor, setting: _Setting) -> Any:
    """Sum the weights of class indices that count; count probabilities [N, classes, ...]."""
    if targets.is_floating_point():
        return targets.numel() / max(targets.shape[1] if targets.dim() > 1 else targets.shape[0], 1)
    counted = targets != setting("ignore_index", -100)
    weight = setting("weight")
    if weight is None:
        return counted.sum()
    if weight.device.type != "cpu":  # whose values the host would wait for
        targets, counted = on_device(targets, weight.device), on_device(counted, weight.device)
    each = weight.detach().to(targets.device, torch.float64)[torch.where(counted, targets, 0)]
    total = torch.where(counted, each, 0.0).sum()
    if setting("label_smoothing", 0.0):
        lost = ~(total > 0) & counted.any()
        if lost.device.type != "cpu":  # the host would wait for it: the batch's loss is NaN then
            return torch.where(lost, torch.nan, total)
        if lost:
            raise ValueError(
                "all classes of a microbatch have weight 0 in loss_fn, but label_smoothing gives them a loss, which "
                "the microbatch's own mean, over 0, cannot have: give these classes a small weight (1e-6), or "
                "ignore_index as target, leave out label_smoothing, or take fewer microbatches"
            )
    return total


def _elements(targets: torch.Tensor, setting: _Setting) -> int:
    return targets.numel()


def _rows(targets: torch.Tensor, setting: _Setting) -> int:
    return targets.shape[0]


def _divergence(targets: torch.Tensor, setting: _Setting) -> int:
    return targets.shape[0] if setting("reduction", "mean") == "batchmean" else targets.numel()


class _Divisor(Protocol):
    def __call__(self, targets: Any, setting: _Setting) -> Any: ...


# loss function -> what its mean divides by, given the targets
_DIVISORS: dict[Any, _Divisor] = {
    cross_entropy: _classes,
    F.cross_entropy: _classes,
    F.nll_loss: _classes,
    F.mse_loss: _elements,
    F.l1_loss: _elements,
    F.smooth_l1_loss: _elements,
    F.huber_loss: _elements,
    F.binary_cross_entropy: _elements,
    F.binary_cross_entropy_with_logits: _elements,
    F.poisson_nll_loss: _elements,
    F.soft_margin_loss: _elements,
    F.hinge_embedding_loss: _elements,
    F.kl_div: _divergence,
    F.multi_margin_loss: _rows,
    F.multilabel_margin_loss: _rows,
    F.multilabel_soft_margin_loss: _rows,
}

# functions that broadcast outputs and targets
_BROADCAST = {F.multilabel_soft_margin_loss, *(of for of, by in _DIVISORS.items() if by in (_elements, _divergence))}

# forward of a module -> the function that it calls; a subclass that overrides it is not among these
_FORWARDS: dict[Any, Any] = {
    nn.CrossEntropyLoss.forward: F.cross_entropy,
    nn.NLLLoss.forward: F.nll_loss,
    nn.MSELoss.forward: F.mse_loss,
    nn.L1Loss.forward: F.l1_loss,
    nn.SmoothL1Loss.forward: F.smooth_l1_loss,
    nn.HuberLoss.forward: F.huber_loss,
    nn.BCELoss.forward: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss.forward: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss.forward: F.poisson_nll_loss,
    nn.SoftMarginLoss.forward: F.soft_margin_loss,
    nn.HingeEmbeddingLoss.forward: F.hinge_embedding_loss,
    nn.KLDivLoss.forward: F.kl_div,
    nn.MultiMarginLoss.forward: F.multi_margin_loss,
    nn.MultiLabelMarginLoss.forward: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss.forward: F.multilabel_soft_margin_loss,
}


@dataclass(frozen=True)
class Weighing:
    """The weights of a batch's microbatches.

    Attributes:
        weigh: targets of a microbatch -> how much it counts; None: losses add up, each counts 1.
        ignore_index: the integer target that does not count.
        known: nothing needs a check: it is torch's loss, or the user's own ``loss_weight``.
        broadcasts: a loss of torch's that broadcasts outputs and targets; see :func:`check_rows`.
    """

    weigh: Callable[[Any], Any] | None
    ignore_index: int
    known: bool
    broadcasts: bool = False

    def shares(self, targets: list[Any], counts: list[int] | None = None) -> list[torch.Tensor]:
        """Return each microbatch's share of the batch's loss, 0-dimensional fp32: they add up to 1, or are 1 for a sum.

        Args:
            targets: of each microbatch.
            counts: what :meth:`counts` has said of them.

        Raises:
            ValueError: as :func:`target_weights`.
        """
        if self.weigh is None:
            return [torch.ones((), dtype=torch.float32, device="cpu") for _ in targets]
        if counts is None:
            return target_weights(targets, self.weigh, self.ignore_index)
        return shares_of(counts, self.ignore_index)

    def counts(self, targets: list[Any]) -> list[int] | None:
        """Return what each microbatch counts where that is the number of its targets, and quickly told; else None."""
        weigh = self.weigh
        if not isinstance(weigh, functools.partial):
            return None
        if weigh.func is count_targets:
            return count_each(targets, self.ignore_index)
        setting = weigh.keywords["setting"] if weigh.func is _classes else None
        if setting is None or setting("weight") is not None:
            return None
        return count_each(targets, setting("ignore_index", -100))


def weighing_of(loss_fn: Any, loss_weight: Callable[[Any], Any] | str | None = None) -> Weighing:
    """Return how to weigh the microbatches of a loss.

    Args:
        loss_fn: a torch loss, its function, a partial of one, or any other callable.
        loss_weight: the user's own: targets -> how much they count, or "sum".

    Raises:
        ValueError: it has reduction="none", or class weights that are negative or not finite.
    """
    function, setting = _unwrapped(loss_fn)
    reduction = _reduction_of(setting)
    ignore_index = setting("ignore_index", -100)
    if isinstance(loss_weight, str) and loss_weight != SUM:
        raise ValueError(f"unknown loss_weight {loss_weight!r}; there is {SUM!r}, or give a function of the targets")
    divisor = _DIVISORS.get(function) if callable(function) else None
    broadcasts = divisor is not None and function in _BROADCAST
    if loss_weight is not None:
        weigh: Any = None if loss_weight == SUM else loss_weight
        return Weighing(weigh, ignore_index, known=True, broadcasts=broadcasts)
    if reduction not in ("mean", "batchmean", SUM):
        raise ValueError(f"loss_fn has reduction={reduction!r}, but a step needs one number: give it 'mean' or 'sum'")
    weight = setting("weight")
    if divisor is _classes and isinstance(weight, torch.Tensor) and not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError(f"loss_fn.weight must be 0 or more, and finite, got {weight.tolist()}")
    if reduction == SUM:
        return Weighing(None, ignore_index, known=divisor is not None, broadcasts=broadcasts)
    if divisor is not None:
        weigh = functools.partial(divisor, setting=setting)
        return Weighing(weigh, ignore_index, known=True, broadcasts=broadcasts)
    return Weighing(functools.partial(count_targets, ignore_index=ignore_index), ignore_index, known=False)


def check_rows(outputs: Any, targets: Any) -> None:
    """Check that a loss which broadcasts compares each row of a microbatch's outputs with the target of that row alone.

    Raises:
        ValueError: outputs [rows, 1] beside targets [rows], say: every output would meet every target of the batch.
    """
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)) or not targets.dim():
        return
    if outputs.dim() != targets.dim() or outputs.shape[:1] != targets.shape[:1]:
        raise ValueError(
            f"loss_fn broadcasts outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}, "
            "so that rows meet the targets of other rows: it cannot be computed by microbatches. Give both the same "
            "shape (targets.unsqueeze(-1), say), or train with microbatches=1"
        )


@dataclass(frozen=True)
class PlainCrossEntropy:
    """The mean cross-entropy of logits and class indices, without class weights and label smoothing.

    Attributes:
        ignore_index: the target that does not count.
        any_rows: it takes logits [..., classes]; torch's takes [N, classes].
    """

    ignore_index: int
    any_rows: bool


def plain_cross_entropy(loss_fn: Any) -> PlainCrossEntropy | None:
    """Return what a loss is, by its settings of now, if it is a plain cross-entropy; None for any other."""
    function, setting = _unwrapped(loss_fn)
    if isinstance(loss_fn, OnRawOutputs) or not (function is cross_entropy or function is F.cross_entropy):
        return None
    ours = function is cross_entropy
    if setting.given.keys() - (() if ours else _CROSS_ENTROPY_SETTINGS):
        return None
    owner, ignore_index = setting.owner, setting("ignore_index", -100)
    if isinstance(owner, nn.Module) and (type(owner) is not nn.CrossEntropyLoss or not unwatched(owner)):
        return None
    smooth = setting("label_smoothing", 0.0) != 0.0 or setting("weight") is not None
    if smooth or setting("reduction", "mean") != "mean" or not isinstance(ignore_index, int):
        return None
    return PlainCrossEntropy(ignore_index, any_rows=ours)


_CROSS_ENTROPY_SETTINGS = {"weight", "ignore_index", "reduction", "label_smoothing"}


def _unwrapped(loss_fn: Any) -> tuple[Any, _Setting]:
    """Return the innermost function of a loss, the key in `_DIVISORS` if it is known, and its settings."""
    given: dict[str, Any] = {}
    plain = True  # no argument was bound by its place
    while True:
        owner = getattr(loss_fn, "__self__", None)
        if isinstance(loss_fn, functools.partial):
            given, plain, loss_fn = {**loss_fn.keywords, **given}, plain and not loss_fn.args, loss_fn.func
        elif isinstance(owner, nn.Module) and loss_fn.__name__ in ("forward", "__call__"):
            loss_fn = owner
        elif (inner := torch_private.inner_of_compiled(loss_fn)) is not None:
            loss_fn = inner
        else:
            break
    function = loss_fn
    if isinstance(loss_fn, nn.Module):
        function = None if "forward" in vars(loss_fn) else _FORWARDS.get(type(loss_fn).forward)
    return (function if plain else None), _Setting(given, loss_fn)


def _reduction_of(setting: _Setting) -> Any:
    size_average, reduce = setting.given.get("size_average"), setting.given.get("reduce")
    if size_average is not None or reduce is not None:
        return torch_private.legacy_reduction(size_average, reduce)
    return setting("reduction", "mean")
