"""Cut a batch into microbatches and say how much each counts in the batch's mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spu.common.moves import in_page_locked_memory
from spu.common.torch_private import pytree
from spu.engine.crossing import check_known
from spu.model.packed import carry
from spu.ops.reference.linear import exact
from spu.ops.sink import current_scope

__all__ = [
    "as_dicts",
    "at_least",
    "batch_rows",
    "count_each",
    "count_targets",
    "elements",
    "join_rows",
    "move",
    "shares_of",
    "split_batch",
    "target_weights",
    "unscaled_leaves",
]


def as_dicts(batch: Any) -> Any:
    """Return the batch with every mapping unknown to pytrees, such as transformers' BatchEncoding, as a dict."""

    def plain(leaf: Any) -> Any:
        return {key: as_dicts(value) for key, value in leaf.items()} if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(plain, batch)


def split_batch(batch: Any, parts: int, what: str = "inputs") -> list[Any]:
    """Split every tensor of a pytree along dimension 0 into ``parts`` microbatches of nearly equal size.

    Sizes differ by at most one row, the larger ones first, as in ``torch.tensor_split``. Leaves that are no tensors,
    and 0-dimensional tensors, go to every microbatch as they are.

    Raises:
        ValueError: no tensor in it, tensors that disagree on the batch size, or fewer rows than microbatches.
        TypeError: an object in it has tensors that pytree does not see: they would go to every microbatch whole.
    """
    check_known(batch, f"{what} hold")
    leaves, spec = pytree.tree_flatten(batch)
    rows = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
    if not rows:
        found = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        raise ValueError(
            f"{what} hold no tensor with a batch dimension{found and f' ({found})'}; pass a tensor, such as "
            "torch.as_tensor(values), or a tuple or dict of tensors"
        )
    if len(rows) > 1:
        raise ValueError(
            f"tensors of the {what} disagree on the batch size (dimension 0): {sorted(rows)}; make them equal"
        )
    size = rows.pop()
    if size < parts:
        raise ValueError(
            f"a batch of {size} rows cannot be split into {parts} microbatches (microbatches x accumulate); "
            f"pass at least {parts} rows, or lower microbatches or accumulate"
        )

    def pieces(leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            if leaf.is_inference():  # autograd would not save it for a backward
                leaf = leaf.clone()
            # Views share a version counter: a layer that changes its input in place would seem to change them all.
            return tuple(part if part.requires_grad else part.data for part in torch.tensor_split(leaf, parts))
        return (leaf,) * parts

    columns = [pieces(leaf) for leaf in leaves]
    return [pytree.tree_unflatten([column[i] for column in columns], spec) for i in range(parts)]


def batch_rows(batch: Any) -> int:
    """Return the batch size: dimension 0 of the first tensor that has one; 1 if there is none."""
    leaves = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((leaf.shape[0] for leaf in leaves), 1)


@exact
def join_rows(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """Return the tensors of microbatches as one, in their dtype: autocast refuses to join fp16 where it is for bf16."""
    return torch.cat((first, *rest))


def at_least(batch: Any, rows: int) -> Any:
    """Repeat the batch's rows in order until there are ``rows``: a sample for planning."""

    def longer(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.dim() == 0 or not 0 < leaf.shape[0] < rows:
            return leaf
        return leaf[torch.arange(rows, device=leaf.device) % leaf.shape[0]]

    return pytree.tree_map_only(torch.Tensor, longer, batch)


def count_targets(targets: Any, ignore_index: int = -100) -> int | torch.Tensor:
    """Count the targets of a mean loss: integers other than ``ignore_index``, or all elements of floating ones."""
    counts: list[Any] = []
    for leaf in pytree.tree_leaves(targets):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.is_floating_point() or leaf.dtype == torch.bool:
            counts.append(leaf.numel())
        else:
            counts.append((leaf != ignore_index).sum())
    return sum(counts)


def count_each(parts: Sequence[Any], ignore_index: int = -100) -> list[int] | None:
    """Return `count_targets` of each microbatch, by a few ops for all of them; None where these are no integer tensors
    of one shape on the CPU.
    """
    first = parts[0] if parts else None
    if type(first) is not torch.Tensor or first.device.type != "cpu":
        return None
    if first.is_floating_point() or first.is_complex() or first.dtype == torch.bool:
        return None
    if any(type(p) is not torch.Tensor or p.shape != first.shape or p.dtype != first.dtype for p in parts[1:]):
        return None
    counts: list[int] = (torch.stack(tuple(parts)) != ignore_index).reshape(len(parts), -1).sum(1).tolist()
    return counts


def target_weights(
    targets: list[Any], loss_weight: Callable[[Any], Any] | None = None, ignore_index: int = -100
) -> list[torch.Tensor]:
    """Return each microbatch's share of the batch's mean loss, as 0-dimensional fp32 tensors that add up to 1.

    The mean over a batch is the sum over its microbatches of ``share * mean over the microbatch``, whatever their
    sizes and however many of their targets are masked.

    Raises:
        ValueError: no target counts at all, or a count is negative or not finite (checked only where the counts are on
            the host; on a GPU such a batch's shares are NaN).
    """
    weigh = loss_weight or (lambda part: count_targets(part, ignore_index))
    counts = [_number(weigh(part)) for part in targets]
    together = torch.stack([count.to(counts[0].device).reshape(()) for count in counts])
    valid, total = ((together >= 0) & together.isfinite()).all(), together.sum()
    if total.device.type == "cpu" and not valid:
        raise ValueError(f"a microbatch must count 0 or more in the loss, and not NaN or inf: got {together.tolist()}")
    if total.device.type == "cpu" and not total > 0:
        raise ValueError(_nothing_counts(ignore_index))
    shares = torch.where(valid, together / total, torch.nan).to(torch.float32)
    return [share.to(count.device).reshape(()) for share, count in zip(shares, counts, strict=True)]


def _number(count: torch.Tensor | float) -> torch.Tensor:
    if isinstance(count, torch.Tensor):  # as_tensor moves it to the default device
        return count.detach().to(torch.float64)
    return torch.as_tensor(count, dtype=torch.float64, device="cpu")


def shares_of(counts: Sequence[int], ignore_index: int) -> list[torch.Tensor]:
    """Return `target_weights` by the number of each microbatch's targets.

    Raises:
        ValueError: all are 0.
    """
    total = sum(counts)
    if not total:
        raise ValueError(_nothing_counts(ignore_index))
    return list(torch.tensor([count / total for count in counts], dtype=torch.float64, device="cpu").to(torch.float32))


def _nothing_counts(ignore_index: int) -> str:
    return f"no target of the batch counts in the loss (all equal ignore_index {ignore_index}, or weigh nothing)"


def elements(tree: Any) -> int:
    """Return the number of all elements of a pytree's tensors."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def move(tree: Any, device: torch.device) -> Any:
    """Return the pytree with every tensor on ``device``. Tensors of the host may be changed when it returns.

    A card reads page-locked memory later than it is asked to, and the caller's own may be filled with the next batch by
    then. A copy of pageable memory would make the host wait for the card, and so would to ask it what a decoder's
    packed rows hold.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.requires_grad
        if device.type == "cuda" and tensor.device.type == "cpu" and plain:
            tensor = in_page_locked_memory(tensor)
        return tensor.to(device, non_blocking=device.type != "cpu")

    # Most trees are a tensor, and to walk one costs more than to move it.
    there = moved(tree) if isinstance(tree, torch.Tensor) else pytree.tree_map_only(torch.Tensor, moved, tree)
    if device.type != "cpu":
        carry(tree, there)
    return there


def unscaled_leaves(tree: Any) -> Any:
    """Return the pytree; gradients of tensors that require one leave the step at their true scale."""

    def unscaled(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad and torch.is_grad_enabled():
            tensor = tensor.view_as(tensor)
            tensor.register_hook(_unscale)
        return tensor

    return unscaled(tree) if isinstance(tree, torch.Tensor) else pytree.tree_map_only(torch.Tensor, unscaled, tree)


def _unscale(gradient: torch.Tensor) -> torch.Tensor:
    scope = current_scope()
    return gradient if scope is None else gradient * scope.inv_scale.reshape(()).to(gradient.device)
