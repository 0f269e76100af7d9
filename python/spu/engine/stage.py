"""A stage: consecutive layers on one device, and the forward and backward of one microbatch through them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from spu.common.torch_private import pytree
from spu.devices.manager import Device
from spu.engine.apart import part_gradients
from spu.engine.crossing import arrive, check_known, depart
from spu.engine.head_loss import HeadInput, HeadLoss
from spu.engine.loss import check_rows, loss_of
from spu.engine.loss_errors import EXPLAINED, explained
from spu.engine.microbatch import move
from spu.engine.skips import StageSkips
from spu.memory.activations import ActivationStore
from spu.model.kept import Park
from spu.model.layers import DrawKey, Layer
from spu.model.randomness import LOSS, BackwardRandomness, LayerRandomness
from spu.ops.cut import Cut, LeafCut, hollow, is_start
from spu.ops.sink import BackwardScope, scoped
from spu.skips import carried_by, current_carrier

__all__ = ["Stage"]

_OTHER_SHAPES = re.compile("shape|sizes|size of tensor|invalid gradient")
"""In the words of operators and of autograd, where the checkpoint itself has not seen it."""


@dataclass
class _InFlight:
    """The state of one microbatch between its forward and its backward."""

    cuts: list[Cut | LeafCut | None]  # receive the gradients of the stage's inputs; None for an input without one
    outputs: list[Any]  # the stage's outputs, or its scaled loss
    skips: StageSkips | None
    randomness: BackwardRandomness
    from_outside: bool = False  # an input has a graph of the user's


class Stage:
    """Runs microbatches through consecutive layers; used by one worker thread at a time.

    Args:
        index: position in the pipeline.
        layers: the stage's layers, already on the device.
        device: where they are.
        is_last: the stage computes the loss.
        loss_fn: ``loss_fn(outputs, targets)`` returning a mean; used by the last stage.
        recompute: for each layer, whether it keeps only its input for the backward; none does by default.
        parts: everything that the stage trains, by default its layers: the loss may be a module with parameters.
        activations: where the inputs of recomputed layers wait for the backward; None: on the device.

    Attributes:
        elsewhere: id -> name of parameters of other stages.
        reaches_outside: a backward has sent gradients to tensors that are not the stage's.
    """

    def __init__(
        self,
        index: int,
        layers: list[Layer],
        device: Device,
        *,
        is_last: bool,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        recompute: Sequence[bool] = (),
        parts: Sequence[Layer] | None = None,
        activations: ActivationStore | None = None,
    ) -> None:
        self.index = index
        self.layers = layers
        self.device = device
        self.activations = activations
        self.is_first = index == 0
        self.is_last = is_last
        self.loss_fn = loss_fn
        self.recompute = list(recompute) or [False] * len(layers)
        self.wants_inputs = any(layer.wants_inputs for layer in layers)
        self.parts = list(layers if parts is None else parts)
        self.elsewhere: dict[int, str] = {}
        found = {id(p): p for layer in self.parts for _, p in layer.named_parameters()}
        self._parameters, self._leaves_known = list(found.values()), False
        self.reaches_outside = False
        self.watch_loss: Callable[[Any, Any], None] | None = None  # called with the arguments of each loss
        self.checks_rows = False  # `check_rows` of these arguments
        self._head_loss = HeadLoss.of(layers[-1], loss_fn) if is_last and layers else None
        self._in_flight: dict[int, _InFlight] = {}
        self._deferred: dict[int, list[Callable[[], None]]] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Return the stage's leaves, each once, in order of first use; its aliases too."""
        return list(self._parameters)

    def forward(
        self, x: Any, inputs: Any, key: DrawKey, *, train: bool, skips: StageSkips | None = None, whole: bool = True
    ) -> Any:
        """Run one microbatch and remember what its backward needs.

        Args:
            x: the previous stage's outputs, or the microbatch's inputs for the first stage, on this device.
            inputs: the microbatch's inputs, on this device, if ``wants_inputs``.
            key: decides the random draws; its microbatch number identifies the pass until :meth:`backward`.
            train: keep the graph.
            skips: carries what layers stash for other stages.
            whole: of the last stage: the outputs are wanted themselves, and not for :meth:`loss` alone.

        Returns:
            The last stage's outputs, attached to their graph, or a `HeadInput` in their place; of another stage the
            message for the next one, likewise.
        """
        from_outside = self.is_first and any(getattr(leaf, "requires_grad", False) for leaf in pytree.tree_leaves(x))
        arrived = None if self.is_first else arrive(x, train=train)
        if arrived is not None:
            x = arrived.tree
            if skips is not None:
                skips.arrived = pytree.tree_leaves(x)
        randomness = BackwardRandomness(key.run_seed, key.step, key.microbatch, key.kept)
        draws = LayerRandomness(key.run_seed, key.step, key.microbatch, "", kept=key.kept)
        with carried_by(skips or current_carrier()), draws:
            for position, (layer, recompute) in enumerate(zip(self._layers_for(whole), self.recompute, strict=True)):
                randomness.layer(layer.name)
                step: Callable[..., Any] = partial(layer.run, within=draws)
                if recompute and train:
                    step = partial(layer.run_checkpointed, park=self._park(key.microbatch, position))
                x = step(x, inputs, key)  # (3) in docs/architecture.md
        randomness.end()
        if arrived is not None:
            arrived.check()
        if skips is not None:
            skips.check()
            skips.arrived = []
        if not self.is_last:
            check_known(x, f"layer {self.layers[-1].name if self.layers else ''!r} hands to the next stage")
            x = depart(x, skips.outgoing() if skips is not None else (), self._buffers)
        if train:
            ends = [] if arrived is None else arrived.ends
            outputs = [] if self.is_last else pytree.tree_leaves(x)
            if self.activations is not None:
                # All that a backward needs of a message: a gradient's place for each leaf.
                outputs = [hollow(t) if isinstance(t, Tensor) and t.requires_grad else None for t in outputs]
            self._in_flight[key.microbatch] = _InFlight(ends, outputs, skips, randomness, from_outside)
        return x

    def _park(self, microbatch: int, position: int) -> Park | None:
        """Return what takes a layer's input away; None where it stays: the batch itself, which its owner holds anyway,
        and in the last stage, where a backward follows its forward at once.
        """
        if self.activations is None or self.is_last or (self.is_first and position == 0):
            return None
        return partial(self.activations.park, (self.index, microbatch, position))

    def _layers_for(self, whole: bool) -> list[Layer]:
        """Return the layers to run; the last one without its head's product if the loss may compute that."""
        if whole or self._head_loss is None or self.watch_loss is not None:
            return self.layers
        return [*self.layers[:-1], self._head_loss]

    def _buffers(self) -> Iterator[Tensor]:
        return (buffer for layer in self.layers for buffer in layer.module.buffers())

    def loss(
        self, outputs: Any, targets: Any, weight: torch.Tensor, key: DrawKey, scope: BackwardScope | None
    ) -> torch.Tensor:
        """Return the microbatch's share of the batch's mean loss, unscaled, as a detached fp32 scalar. With a ``scope``
        its value may be there only when :meth:`backward` has run.

        Args:
            outputs: from :meth:`forward` of the last stage.
            targets: the microbatch's targets, on any device.
            weight: the microbatch's share, 0-dimensional fp32.
            key: as given to :meth:`forward`.
            scope: the scale of the backward to come; None when there is none.
        """
        targets = move(targets, self.device.torch_device)
        if self.watch_loss is not None:
            self.watch_loss(outputs, targets)
        if self.checks_rows:
            check_rows(outputs, targets)
        flight = None if scope is None else self._in_flight[key.microbatch]
        if flight is not None:
            flight.randomness.layer(LOSS)
        # A number where the host knows it: a copy of four bytes to a card would make the host wait for the card.
        # Captured work reads it from its place.
        known = weight.device.type == "cpu" and not (key.kept is not None and key.kept.replayed)
        factor = weight.item() if known else weight
        with LayerRandomness(key.run_seed, key.step, key.microbatch, LOSS, kept=key.kept):
            share = None if flight is None else self._share_of(outputs, targets, factor)
            value = self._loss_of(outputs, targets) if share is None else share
        if flight is not None:
            flight.randomness.end()
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, the mean over its targets; got {shape}")
        if share is None:
            share = _weighted(value, factor, outputs)
        if flight is not None:
            flight.outputs.append(share)
        return share.detach()

    def _share_of(self, outputs: Any, targets: Any, factor: float | torch.Tensor) -> torch.Tensor | None:
        """Return the share as a loss that its backward makes; None where it is made here."""
        if self._head_loss is None or not isinstance(outputs, HeadInput):
            return None
        if isinstance(factor, Tensor):
            factor = factor.to(outputs.hidden.device, torch.float32)
        elif factor == 0:
            return None
        return self._head_loss.share(outputs, targets, factor)

    def _loss_of(self, outputs: Any, targets: Any) -> Any:
        try:
            if self._head_loss is None or not isinstance(outputs, HeadInput):
                return loss_of(self.loss_fn, outputs, targets)
            return self._head_loss.loss(outputs, targets)
        except EXPLAINED as error:
            said = explained(error, outputs, targets)
            if said is error:
                raise
            raise said from error

    def backward(self, gradients: Any, key: DrawKey, scope: BackwardScope, *, defer: bool = False) -> Any:
        """Run the backward of one microbatch.

        Args:
            gradients: flat list, one scaled gradient (or None) for each leaf of the message; ignored by the last stage.
            key: as given to :meth:`forward`.
            scope: the loss scale, its inverse, and the flag for a non-finite gradient.
            defer: leave the weight gradients of fused ops to :meth:`weight_backward`; those of other parameters are
                computed here either way.

        Returns:
            Flat list of the scaled gradients of the stage's inputs, None where there is none.
        """
        flight = self._in_flight.pop(key.microbatch)
        if defer:
            scope = replace(scope, deferred=self._deferred.setdefault(key.microbatch, []))
        if self.is_last:
            (loss,) = flight.outputs
            roots, gradients = [loss], [scope.scale.reshape(()).to(loss.dtype)]
        else:
            roots = flight.outputs
        pairs = [
            (root, gradient)
            for root, gradient in zip(roots, gradients, strict=True)
            if isinstance(root, torch.Tensor) and root.requires_grad and gradient is not None
        ]
        if flight.skips is not None:
            pairs += flight.skips.gradients()
        if not self._leaves_known:  # once: a layer's code reaches the same parameters in every microbatch
            foreign = scope.plain or flight.from_outside
            starts, ends = [root for root, _ in pairs], [end for end in flight.cuts if isinstance(end, LeafCut)]
            found = _check_leaves(starts, self._parameters, self.elsewhere, foreign=foreign, stage=self.index)
            self.reaches_outside = any(not any(end.is_at(leaf) for end in ends) for leaf in found)
            self._leaves_known = True
        if pairs:
            # (5) in docs/architecture.md
            fresh = [parameter for parameter in self._parameters if parameter.grad is None]
            opened = scoped([root for root, _ in pairs], scope)
            with flight.randomness.during(self.device.torch_device), self._replayed():
                torch.autograd.backward(opened, [gradient for _, gradient in pairs])
            cuts = [*flight.cuts, *(() if flight.skips is None else flight.skips.ends())]
            part_gradients(fresh, [g for _, g in pairs] + [cut.gradient for cut in cuts if cut is not None])
        if flight.skips is not None:
            flight.skips.send_gradients()
        if self.activations is not None:
            self.activations.release(self.index, key.microbatch)
        return [None if end is None else end.gradient for end in flight.cuts]

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[None]:
        """Say why a layer could not be run again, where packed activations are why."""
        try:
            yield
        except RuntimeError as error:
            other = isinstance(error, CheckpointError) or _OTHER_SHAPES.search(str(error))
            if not other or self.activations is None or self.activations.codec is None:
                raise
            raise RuntimeError(
                "a layer that is run again in the backward has other shapes than in the forward: they depend on its "
                f"input's values, which waited packed as {self.activations.codec}; use activations='exact'"
            ) from error

    @torch.no_grad()  # as in a backward: a gradient may be a view that was made so, which autograd lets nobody change
    def weight_backward(self, key: DrawKey) -> None:
        """Compute the weight gradients that a :meth:`backward` with ``defer`` has deferred, in its order."""
        deferred = self._deferred.pop(key.microbatch)
        deferred.reverse()
        while deferred:  # emptied in place: each holds activations, and the scope, which holds the list
            deferred.pop()()

    def clear(self) -> None:
        """Forget unfinished microbatches, after a failure."""
        self._in_flight.clear()
        self._deferred.clear()
        if self.activations is not None:
            self.activations.clear()


def _weighted(value: torch.Tensor, factor: float | torch.Tensor, outputs: Any) -> torch.Tensor:
    """Return ``value * factor``, 0 for a factor of 0 whatever the value is."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    # A microbatch whose targets are all masked has the mean 0/0; it must count nothing, not NaN. Where the host knows
    # it, the loss's own backward, in which some losses make 0 * NaN, does not run: the outputs' gradients are 0, as
    # they are in the whole batch, where a parameter that only these rows use is decayed too.
    if isinstance(factor, Tensor):
        factor = factor.to(value.device, value.dtype)
        return torch.where(factor == 0, torch.zeros_like(value), value * factor)
    if factor == 0:
        return torch.zeros_like(value) + sum(_zeros(outputs))
    return value * factor


def _zeros(outputs: Any) -> Iterator[Tensor]:
    """Return a 0 for each output that needs a gradient; its gradient is 0 whatever the output's values are."""
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_complex():
            yield leaf.flatten()[:0].sum(dtype=torch.float32)


def _check_leaves(
    roots: Iterable[Any], own: Iterable[nn.Parameter], elsewhere: Mapping[int, str], *, foreign: bool, stage: int
) -> list[Tensor]:
    """Check that a stage's backward ends in parameters of that stage, and return the other leaves in which it ends.

    Args:
        roots: tensors that the backward starts from.
        own: the stage's parameters.
        elsewhere: id -> name of the other stages' parameters.
        foreign: allow parameters that the trainer does not know.

    Raises:
        RuntimeError: it ends in a parameter of another stage, or in a foreign one.
    """
    known, others = {id(parameter) for parameter in own}, list[Tensor]()
    for leaf in _leaves(roots):
        if id(leaf) in known:
            continue
        if id(leaf) in elsewhere:
            raise RuntimeError(
                f"parameter {elsewhere[id(leaf)]!r} of another stage is used in stage {stage} by code that does not "
                "hold it: both stages would add to its gradient at the same time. Make it a parameter of the module "
                "that uses it too (self.weight = other.weight), a loss_fn an nn.Module that does so"
            )
        if not foreign and isinstance(leaf, nn.Parameter):
            raise RuntimeError(
                f"stage {stage} uses a parameter of shape {tuple(leaf.shape)} that is in no layer: it would not be "
                "updated, and its gradient would stay multiplied by the loss scale. Make it a parameter of the module "
                "that uses it, a loss_fn an nn.Module that holds it; the trainer then trains it"
            )
        others.append(leaf)
    return others


def _leaves(roots: Iterable[Any]) -> list[torch.Tensor]:
    stack = [root.grad_fn for root in roots if isinstance(root, torch.Tensor) and root.grad_fn is not None]
    seen, leaves = set(stack), []
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        for following, _ in () if is_start(node) else node.next_functions:  # below it is nobody's
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves
