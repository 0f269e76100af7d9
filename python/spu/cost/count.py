"""What layers cost in training: each run once on fake tensors as a stage runs it, with every byte counted.

A copy of the layer on fake tensors is put into the form that training uses (converted, on fused ops, with main
gradients and a loss scale). Its forward and its backward are run under `spu.common.tracker`, which tells what is live
when: the bytes that a microbatch leaves behind between the two, the most that either needs while it runs, and what
it computes and moves. No weights are read or needed, so a 20B model is costed on a laptop.

A layer that cannot be run on fake tensors, because it reads values, is run on real copies; one that is too large for
that, or fails there too, is bounded by its sizes.
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

from spu.common.absent import is_absent
from spu.common.dtypes import HALVES
from spu.common.fake_ops import fake_copy
from spu.common.interrupts import stop_if_asked
from spu.common.quiet import hushed
from spu.common.torch_private import FakeTensor, FakeTensorMode, is_fake, tree_map, tree_map_only
from spu.common.tracker import Tally
from spu.cost.footprint import DetachedSkips, Footprint, TrainingForm, following, tensor_bytes, tensors_in
from spu.cost.head import WithLoss
from spu.cost.loops import counted_short
from spu.engine.loss import loss_of
from spu.model.layers import Layer
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched
from spu.ops.cross_entropy import counted_as
from spu.plan.layer_cost import LayerCost
from spu.precision.dtypes import state_dtypes

__all__ = ["LossFn", "kind_of", "model_costs"]

LossFn = Callable[[Any, Any], torch.Tensor]

_MOST_BYTES, _MOST_FLOPS = 2 << 30, 2e11
"""What a layer may take, counted roughly, that is run on real tensors to be costed; then it is bounded instead."""


def model_costs(
    layers: Sequence[Layer],
    sample: Any,
    dtype: torch.dtype,
    *,
    fused: bool | None = None,
    loss_fn: LossFn | None = None,
    targets: Any = None,
    device_type: str = "cpu",
    deferred: bool = True,
) -> tuple[list[LayerCost], LayerCost | None]:
    """Return costs of layers that are run one after the other, and of the loss if there are targets.

    The layers, what they reach and the process stay as they are: copies are run, with hooks off.

    Args:
        layers: of a model, in order.
        sample: one microbatch's inputs: a tensor or a structure of them, real, meta or fake.
        dtype: of the training; parameters are taken in it, inputs and buffers as they are (`spu.precision.dtypes`).
        fused: put linear layers on our ops; default: in 16-bit precisions, as the trainer does.
        loss_fn, targets: the loss, and one microbatch of its targets. Where a training computes the loss without
            logits, the last layer's cost is that of both, and the loss has none.
        device_type: of the device that runs the last layer.
        deferred: count what deferred weight gradients keep, too; for a schedule without them that takes time in vain.

    Raises:
        ValueError: there are no layers; or one of a model without values cannot be run on fakes: the message names it.
    """
    if not layers:
        raise ValueError("there are no layers to cost; give at least one")
    products = dtype if dtype in HALVES else None
    chain = [dataclasses.replace(layer, products=products) for layer in layers]
    if loss_fn is not None and targets is not None:
        chain.append(Layer("loss", _Loss(loss_fn, targets)))
    costs: list[LayerCost] = []
    known: dict[Any, tuple[LayerCost, Any]] = {}
    owners: dict[int, int] = {}
    with untouched(*(layer.module for layer in chain)), hooks_off(), hushed(), torch.inference_mode(False):
        counter = _Counter(chain, sample, dtype, dtype in HALVES if fused is None else fused, deferred)
        x = fake_copy(counter.mode, sample)
        for index, layer in enumerate(chain):
            stop_if_asked()
            # Only of decoders' layers is it known that nothing else tells them apart.
            kind = kind_of(layer.module, x) if layer.wants_inputs else None
            found = known.get(kind) if kind is not None else None
            if index == len(layers) - 1 < len(chain) - 1:
                found = counter.cost_with_loss(x, layer, loss_fn, targets, device_type) or found
            if found is None:
                found = counter.cost(x, costs)
                if kind is not None:
                    known[kind] = found
            own = dataclasses.replace(found[0], name=layer.name)
            costs.append(_counted_once(own, layer.module, owners, len(costs)))
            x = found[1]
            if index == len(layers) - 1 and counter.has_loss:
                costs.append(LayerCost(name="loss", input_bytes=4, output_bytes=4))
                break
    counter.form.skips.tensors.clear()
    _check_released(counter.tally)
    return costs[: len(layers)], costs[-1] if len(costs) > len(layers) else None


class _Loss(nn.Module):
    """The loss as a last layer without parameters."""

    def __init__(self, loss_fn: LossFn, targets: Any) -> None:
        super().__init__()
        self.how = (loss_fn, targets)

    def forward(self, x: Any) -> torch.Tensor:
        loss_fn, targets = self.how
        mode = next((t.fake_mode for t in tensors_in(x) if isinstance(t, FakeTensor)), None)
        if mode is not None:
            targets = fake_copy(mode, targets)
        value = loss_of(loss_fn, x, targets)
        return value.to(torch.promote_types(value.dtype, torch.float32)) * 1.0


def _stateless(loss_fn: Any) -> bool:
    """Tell whether a loss is known to keep nothing: torch's, our own, and partials of them."""
    if isinstance(loss_fn, functools.partial):
        return _stateless(loss_fn.func)
    module = type(loss_fn).__module__ if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__module__", None)
    return (module or "").split(".")[0] in ("torch", "spu", "transformers")


def _check_released(tally: Tally) -> None:
    """Warn of fake tensors that are still held."""
    if tally.live:
        gc.collect()
    if tally.live:
        warnings.warn(
            "a layer keeps tensors of planning, which have no values, where spu cannot take them out again: keep them "
            "in attributes or plain containers, or give the trainer a plan= made in another process",
            stacklevel=3,
        )


class _Counter:
    """Costs layers one after the other: on fakes, else on real tensors, else by a bound."""

    def __init__(self, layers: Sequence[Layer], sample: Any, dtype: torch.dtype, fused: bool, deferred: bool) -> None:
        self.layers = layers
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tally = Tally()
        state = [t for layer in layers for t in itertools.chain(layer.module.parameters(), layer.module.buffers())]
        dtypes = {id(t): t.dtype for t in state} | state_dtypes([layer.module for layer in layers], dtype)
        self.form = TrainingForm(dtypes, fused, deferred, sample, DetachedSkips())
        self._has_values = not any(t.is_meta or is_fake(t) or is_absent(t) for t in [*tensors_in(sample), *state])
        self.has_loss = False  # the last layer's cost has it
        self._known_input = (0, sample)  # the real input of the layer of that index

    def cost(self, x: Any, before: list[LayerCost]) -> tuple[LayerCost, Any]:
        """Return the cost of the layer after those of ``before``, and the next one's input, on fakes as ``x`` is."""
        layer = self.layers[len(before)]
        # A loss of the user's may keep what it is given where nobody can find it: no fakes, if that can be.
        keeps = isinstance(layer.module, _Loss) and not _stateless(layer.module.how[0])
        real_first = keeps and self._has_values and _small(layer, x)
        if not real_first:
            try:
                return self._counted(layer, x)
            except Exception as error:
                if not self._has_values:
                    raise ValueError(
                        f"layer {layer.name!r} could not be run on fake tensors: {type(error).__name__}: {error}; "
                        "check the example inputs, and that its forward does not read values (.item(), if on a tensor)"
                    ) from error
        makers: list[Callable[[], Any]] = [lambda: self._true_input(before), lambda: _made_up(x)]
        for maker in reversed(makers) if real_first else makers:
            with contextlib.suppress(Exception):
                if _small(layer, x):
                    given = _wanting(maker(), x)
                    with untouched(layer.module, values=True):
                        cost, after = Footprint(layer, given, self.form, Tally(), None).cost()
                    return cost, fake_copy(self.mode, after)
        return _bound(layer, x), fake_copy(self.mode, following(x))

    def _counted(self, layer: Layer, x: Any) -> tuple[LayerCost, Any]:
        """Return a layer's cost and output, counted on fakes."""

        def short(x: Any, inputs: Any) -> Footprint:
            return Footprint(layer, x, dataclasses.replace(self.form, inputs=inputs), self.tally, self.mode)

        if layer.wants_inputs:
            with self.mode:
                found = counted_short(x, self.form.inputs, short)
            if found is not None:
                return found
        return Footprint(layer, x, self.form, self.tally, self.mode).cost()

    def cost_with_loss(
        self, x: Any, layer: Layer, loss_fn: Any, targets: Any, device_type: str
    ) -> tuple[LayerCost, Any] | None:
        """Return the cost of the last layer and the loss, where they are computed as one; else None."""
        both = WithLoss.on_fakes(layer, loss_fn, targets, self.mode)
        try:
            with counted_as(device_type):
                found = Footprint(both, x, self.form, self.tally, self.mode).cost()
        except Exception:  # LogitsError, or what counting the layer alone will meet again
            return None
        self.has_loss = True
        return found

    def _true_input(self, before: list[LayerCost]) -> Any:
        """Run the layers of ``before``, from the last one whose input is known; return the next one's real input.

        Raises:
            ValueError: that would take too long.
        """
        start, x = self._known_input
        for index in range(start, len(before)):
            layer = self.layers[index]
            if sum(cost.forward_flops for cost in before[start:]) > _MOST_FLOPS or not _small(layer, x):
                raise ValueError("too much work")
            with untouched(layer.module, values=True), torch.no_grad():
                x = following(self.form.run(self.form.copied(layer, None), x))
            self._known_input = index + 1, x
        return x


def _small(layer: Layer, x: Any) -> bool:
    """Tell whether a layer can be run on real tensors in little time and memory, as far as its sizes tell."""
    count = sum(p.numel() for p in layer.module.parameters())
    if 6 * count + 16 * tensor_bytes(x) > _MOST_BYTES:
        return False
    return 6 * count * _rows(x) <= _MOST_FLOPS


def _rows(x: Any) -> int:
    """Return how often a product uses a parameter: elements of all dimensions but the last one's."""
    sized = [t for t in tensors_in(x) if t.dim()]
    return max((t.numel() // (t.shape[-1] or 1) if t.is_floating_point() else t.numel() for t in sized), default=1)


def _made_up(x: Any) -> Any:
    """Return real tensors like fake ones: normal numbers; integers are zeros, which most uses of an index allow."""

    def one(fake: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(fake.shape, dtype=fake.dtype, device="cpu")
        if fake.dtype == torch.bool:
            return made.fill_(True)  # selects everything: the most that there can be
        return made.normal_() if fake.is_floating_point() or fake.is_complex() else made

    return tree_map_only(torch.Tensor, one, x)


def _wanting(values: Any, fakes: Any) -> Any:
    """Return real tensors that want gradients where the fakes do."""
    wants = iter([t.requires_grad for t in tensors_in(fakes)])

    def one(leaf: Any) -> Any:
        return leaf.detach().requires_grad_(next(wants)) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(one, values)


def _bound(layer: Layer, x: Any) -> LayerCost:
    """Return the cost of a layer that cannot be run: several times its input, and its parameters' gradients."""
    parameters = list(layer.module.parameters())
    count, given = sum(p.numel() for p in parameters), tensor_bytes(x)
    rows = _rows(x)
    return LayerCost(
        name=layer.name,
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


def _counted_once(cost: LayerCost, module: nn.Module, owners: dict[int, int], index: int) -> LayerCost:
    """Return the cost without earlier layers' parameters, which become its ties.

    Args:
        cost: of the layer alone.
        module: the layer's.
        owners: id of a parameter -> the last layer that has it; this layer's are added.
        index: the layer's.
    """
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
    """Return what decides a layer's cost and time, to be compared with another's: its modules' classes and plain
    settings, and the shapes of its parameters, its buffers and its input."""
    settings = []
    for name, part in module.named_modules():
        # Plain attributes may change what the layer computes; its place in the model does not.
        own = {key: v for key, v in vars(part).items() if key not in ("layer_idx", "index") and key[:1] != "_"}
        plain = sorted((key, repr(v)) for key, v in own.items() if isinstance(v, str | int | float | bool))
        settings.append((name, type(part), tuple(plain)))
    state = itertools.chain(module.named_parameters(), module.named_buffers())
    shapes = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in state]
    # Behind frozen layers the first one's input wants no gradient, and the others' do.
    given = [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in(x)]
    return tuple(settings), tuple(shapes), tuple(given), module.training
