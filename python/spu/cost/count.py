"""What a layer takes in training: run once on fake tensors exactly as a stage runs it, with every byte counted.

A copy of the layer on fake tensors is put into the form that training uses (converted, on fused ops, with main
gradients and a loss scale), its forward and its backward are run under `spu.common.tracker`, and what is live when is
read off: the bytes that a microbatch leaves behind between the two, the most that either needs while it runs, and
what it computes and moves. No weights are read or needed, so a 20B model is costed on a laptop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from spu import nn as spu_nn
from spu.common.dtypes import HALVES
from spu.common.fake_ops import fake_copy
from spu.common.interrupts import stop_if_asked
from spu.common.quiet import hushed
from spu.common.torch_private import FakeTensor, FakeTensorMode, tree_leaves, tree_map, tree_map_only
from spu.common.tracker import Tally
from spu.cost.rehearsal import Footprint, Run, following, layer_copy, tensor_bytes
from spu.engine.loss import loss_of
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched
from spu.plan.layer_cost import LayerCost
from spu.precision.dtypes import state_dtypes

__all__ = ["Run", "loss_run", "training_costs"]

_MOST_BYTES, _MOST_FLOPS = 2 << 30, 2e11
"""What a layer may take, counted roughly, that is run on real tensors to be costed; then it is bounded instead."""


class _Loss(nn.Module):
    def __init__(self, loss_fn: Callable[[Any, Any], torch.Tensor], targets: Any) -> None:
        super().__init__()
        self.how = (loss_fn, targets)

    def forward(self, x: Any) -> torch.Tensor:
        loss_fn, targets = self.how
        mode = next((t.fake_mode for t in tree_leaves(x) if isinstance(t, FakeTensor)), None)
        if mode is not None:
            targets = fake_copy(mode, targets)
        value = loss_of(loss_fn, x, targets)
        return value.to(torch.promote_types(value.dtype, torch.float32)) * 1.0


def loss_run(loss_fn: Callable[[Any, Any], torch.Tensor], targets: Any) -> Run:
    """The loss as a last layer without parameters; ``targets`` are one microbatch's."""
    return Run("loss", _Loss(loss_fn, targets), foreign=not _stateless(loss_fn))


def _stateless(loss_fn: Any) -> bool:
    """Whether a loss is known to keep nothing: torch's, our own, and partials of them."""
    if isinstance(loss_fn, functools.partial):
        return _stateless(loss_fn.func)
    home = type(loss_fn).__module__ if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__module__", None)
    return (home or "").split(".")[0] in ("torch", "spu", "transformers")


def training_costs(
    runs: Sequence[Run], sample: Any, dtype: torch.dtype, *, fused: bool | None = None, real: bool = False
) -> list[LayerCost]:
    """Costs of layers run one after the other in training.

    Nothing of the layers, of what they reach or of the process is changed: copies are run, with hooks off.

    Args:
        runs: the layers, in order.
        sample: one microbatch's inputs: a tensor or a structure of them, real, meta or fake.
        dtype: of the training; parameters are taken in it, inputs and buffers as they are (`spu.precision.dtypes`).
        fused: whether linear layers run on our ops; default: in 16-bit precisions, as the trainer does.
        real: a layer that cannot be run on fake tensors is run on real ones, or else bounded; never an error.

    Raises:
        ValueError: there are no layers, or (without ``real``) one cannot run without values; the message names it.
    """
    if not runs:
        raise ValueError("there are no layers to cost; give at least one")
    known: dict[Any, tuple[LayerCost, Any]] = {}
    owners: dict[int, int] = {}
    costs: list[LayerCost] = []
    with untouched(*(run.module for run in runs)), hooks_off(), hushed(), torch.inference_mode(False):
        rehearsal = _Rehearsal(runs, sample, dtype, dtype in HALVES if fused is None else fused, real)
        x = fake_copy(rehearsal.mode, sample)
        for run in runs:
            stop_if_asked()
            kind = kind_of(run.module, x) if run.alike else None
            made = known.get(kind) if kind is not None else None
            if made is None:
                made = rehearsal.made(x, costs)
                if kind is not None:
                    known[kind] = made
            costs.append(_counted_once(dataclasses.replace(made[0], name=run.name), run.module, owners, len(costs)))
            x = made[1]
    _check_let_go(rehearsal.tally)
    return costs


def _check_let_go(tally: Tally) -> None:
    """Warns of fake tensors that are still held."""
    if tally.live:
        gc.collect()
    if tally.live:
        warnings.warn(
            "a layer keeps tensors of planning, which have no values, where spu cannot take them out again: keep them "
            "in attributes or plain containers, or give the trainer a plan= made in another process",
            stacklevel=4,
        )


class _Rehearsal:
    """Runs of layers one after the other: on fakes, else on real tensors, else a bound."""

    def __init__(self, runs: Sequence[Run], sample: Any, dtype: torch.dtype, fused: bool, real: bool) -> None:
        self.runs, self.fused, self.real = runs, fused, real
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tally = Tally()
        state = [t for run in runs for t in itertools.chain(run.module.parameters(), run.module.buffers())]
        self.dtypes = {id(t): t.dtype for t in state} | state_dtypes([run.module for run in runs], dtype)
        self._values = (0, sample)  # the real input of the layer of that index

    def made(self, x: Any, before: list[LayerCost]) -> tuple[LayerCost, Any]:
        """The cost of the layer after those of ``before``, and the next one's input, on fakes as ``x`` is."""
        run = self.runs[len(before)]
        foreign = self.real and run.foreign and _small(run, x)
        if not foreign:
            try:
                footprint = Footprint(run, x, self.dtypes, fused=self.fused, tally=self.tally, mode=self.mode)
                return footprint.made()
            except Exception as error:
                if not self.real:
                    raise ValueError(
                        f"layer {run.name!r} could not be run on fake tensors: {type(error).__name__}: {error}; "
                        "check the example inputs, and that its forward does not read values (.item(), if on a tensor)"
                    ) from error
        makers: list[Callable[[], Any]] = [lambda: self._true_input(before), lambda: _made_up(x)]
        for maker in reversed(makers) if foreign else makers:
            with contextlib.suppress(Exception):
                if _small(run, x):
                    return self._measured(run, _wanting(maker(), x))
        return _bound(run, x), fake_copy(self.mode, following(x))

    def _measured(self, run: Run, x: Any) -> tuple[LayerCost, Any]:
        with untouched(run.module, values=True):
            cost, after = Footprint(run, x, self.dtypes, fused=self.fused, tally=Tally(), mode=None).made()
        return cost, fake_copy(self.mode, after)

    def _true_input(self, before: list[LayerCost]) -> Any:
        """The real input of the layer after those of ``before``: they are run, from the last one whose input is known.

        Raises:
            ValueError: that would take too long.
        """
        start, x = self._values
        for index in range(start, len(before)):
            run = self.runs[index]
            if sum(cost.forward_flops for cost in before[start:]) > _MOST_FLOPS or not _small(run, x):
                raise ValueError("too much work")
            with untouched(run.module, values=True), torch.no_grad():
                module = layer_copy(run.module, None, self.dtypes)
                if self.fused:
                    spu_nn.accelerate(module)
                x = following(run(module, x))
            self._values = index + 1, x
        return x


def _small(run: Run, x: Any) -> bool:
    """Whether a layer can be run on real tensors in little time and memory, as far as its size tells."""
    count = sum(p.numel() for p in run.module.parameters())
    if 6 * count + 16 * tensor_bytes(x) > _MOST_BYTES:
        return False
    return 6 * count * _rows(x) <= _MOST_FLOPS


def _rows(x: Any) -> int:
    """How often a product uses a parameter: elements of all dimensions but the last one's."""
    sized = [t for t in _tensors(x) if t.dim()]
    return max((t.numel() // (t.shape[-1] or 1) if t.is_floating_point() else t.numel() for t in sized), default=1)


def _made_up(x: Any) -> Any:
    """Real tensors like fake ones: normal numbers; integers are zeros, which most uses of an index allow."""

    def one(fake: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(fake.shape, dtype=fake.dtype)
        if fake.dtype == torch.bool:
            return made.fill_(True)  # selects everything: the most that there can be
        return made.normal_() if fake.is_floating_point() or fake.is_complex() else made

    return tree_map_only(torch.Tensor, one, x)


def _wanting(values: Any, fakes: Any) -> Any:
    """Real tensors that want gradients where the fakes do."""
    wants = iter([t.requires_grad for t in _tensors(fakes)])

    def one(leaf: Any) -> Any:
        return leaf.detach().requires_grad_(next(wants)) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(one, values)


def _bound(run: Run, x: Any) -> LayerCost:
    """The cost of a layer that cannot be run: several times its input, and its parameters' gradients."""
    parameters = list(run.module.parameters())
    count, given = sum(p.numel() for p in parameters), tensor_bytes(x)
    rows = _rows(x)
    return LayerCost(
        name=run.name,
        basis="bound",
        forward_flops=2 * count * rows,
        backward_flops=4 * count * rows,
        param_count=count,
        trained_count=sum(p.numel() for p in parameters if p.requires_grad),
        own_bytes=4 * given,
        input_bytes=given,
        output_bytes=given,
        input_saved=True,
        output_saved=True,
        forward_extra_bytes=4 * given,
        backward_extra_bytes=8 * given + 4 * count,
        forward_traffic_bytes=8 * given,
        backward_traffic_bytes=16 * given,
    )


def _tensors(x: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def _counted_once(cost: LayerCost, module: nn.Module, owners: dict[int, int], index: int) -> LayerCost:
    """The cost without earlier layers' parameters, which become its ties; ``owners`` has the last layer of each."""
    ties: dict[int, list[int]] = {}
    for parameter in module.parameters():
        if id(parameter) in owners:
            tie = ties.setdefault(owners[id(parameter)], [0, 0])
            tie[0] += parameter.numel()
            tie[1] += parameter.numel() if parameter.requires_grad else 0
        owners[id(parameter)] = index
    if not ties:
        return cost
    shared, trained = (sum(tie[k] for tie in ties.values()) for k in range(2))
    return dataclasses.replace(
        cost,
        param_count=cost.param_count - shared,
        trained_count=cost.trained_count - trained,
        ties=tuple((layer, counts[0], counts[1]) for layer, counts in sorted(ties.items())),
    )


def kind_of(module: nn.Module, x: Any) -> tuple[Any, ...]:
    """Return what tells a layer's cost and time from another's: its modules' classes and plain settings, the shapes of
    its parameters, its buffers and its input."""
    settings = [
        (name, type(part), tuple(sorted((key, repr(v)) for key, v in vars(part).items() if _is_setting(key, v))))
        for name, part in module.named_modules()
    ]
    state = itertools.chain(module.named_parameters(), module.named_buffers())
    shapes = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in state]
    given = [(tuple(t.shape), t.dtype) for t in _tensors(x)]
    return tuple(settings), tuple(shapes), tuple(given), module.training


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute is a plain one that may change what the layer computes: not its place in the model."""
    own = name in ("layer_idx", "index") or name.startswith("_")
    return isinstance(value, str | int | float | bool) and not own
