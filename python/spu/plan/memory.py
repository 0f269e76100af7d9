"""The bytes that a stage holds in memory, by category."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from spu.common.codecs import packed_bytes
from spu.plan.layer_cost import LayerCost

__all__ = [
    "ITEM_BYTES",
    "STATE_BYTES",
    "WIRE_BUFFERS",
    "Boundary",
    "MicrobatchBytes",
    "StageBytes",
    "StageMemory",
    "pinned_bytes",
    "state_bytes",
    "update_bytes",
    "wire_bytes",
]

ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Bytes per weight and per activation element, by precision."""

STATE_BYTES = {"fp32": (4.0, 8.0), "exact": (2.0, 2.125), "compact": (1.0, 2.125)}
"""Bytes of (master or its correction, moments) per trained parameter with a 16-bit weight, by the form of the state.
A moment of 8 bits has an fp32 scale for each block of 64."""

WIRE_BUFFERS = 2  # per boundary and direction: one being filled while the other is read


@dataclass(frozen=True)
class StageBytes:
    """Peak bytes of one stage by category; ``workspace_bytes`` is what comes and goes within one action."""

    param_bytes: int
    main_grad_bytes: int
    master_bytes: int
    moment_bytes: int
    saved_bytes: int
    wire_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return sum(getattr(self, entry.name) for entry in fields(StageBytes))

    @property
    def state_bytes(self) -> int:
        """The bytes held all the time: weights, main gradients, masters and moments."""
        return self.param_bytes + self.main_grad_bytes + self.master_bytes + self.moment_bytes


def state_bytes(cost: LayerCost, precision: str, first: int = 0, state: str = "fp32") -> tuple[int, int, int, int]:
    """Return the bytes (weights, main gradients, masters, moments) of a layer in a stage that begins with `first`.

    A parameter has a weight in its precision; a trained one also an fp32 main gradient, a master or its correction
    where weights have 16 bits, and two moments, in the form `state` of `STATE_BYTES`. A parameter that an earlier layer
    of the same stage has, too, is counted there alone; of one that only an earlier stage has, a weight and a gradient
    are counted here.
    """
    item = ITEM_BYTES[precision]
    apart = [(params, trained) for before, params, trained in cost.ties if before < first]
    weights, gradients = cost.param_count + sum(p for p, _ in apart), cost.trained_count + sum(t for _, t in apart)
    master, moments = (math.ceil(size * cost.trained_count) for size in STATE_BYTES[state])
    return item * weights, 4 * gradients, master if item == 2 else 0, moments


def update_bytes(state: str) -> int:
    """Return the memory traffic of an update per trained parameter with a 16-bit weight, in this form of the state.

    Gradients are read for the norm and for the step, and set to 0; the state is read and written, and so is the weight,
    which is not read where there is an fp32 master.
    """
    return math.ceil(12 + 2 * sum(STATE_BYTES[state]) + (2 if state == "fp32" else 4))


def wire_bytes(output_bytes: int, precision: str, codec: str) -> int:
    """Return the bytes on the wire for a tensor of `output_bytes` in `precision`; codec "none" sends it as it is.

    Raises:
        ValueError: for an unknown codec.
    """
    if codec == "none":
        return output_bytes
    return packed_bytes(output_bytes // ITEM_BYTES[precision], codec)


def pinned_bytes(count: int) -> int:
    """Return the page-locked host memory that `count` bytes take: torch's allocator rounds up to a power of two."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


@dataclass(frozen=True)
class MicrobatchBytes:
    """Bytes of one microbatch on a stage.

    Attributes:
        each: between its forward and its backward.
        left: between its input gradient and its weight gradients, where these are deferred.
        most: while one of its actions runs.
    """

    each: int
    left: int
    most: int


@dataclass(frozen=True)
class Boundary:
    """How a stage boundary is crossed.

    Attributes:
        codec: "none" or the name of a codec.
        copied: the receiver gets a copy; False between devices that share memory, with codec "none".
        before_on_gpu, after_on_gpu: whether the device on that side is a GPU; a CPU beside one pins its wires.
    """

    codec: str
    copied: bool
    before_on_gpu: bool = False
    after_on_gpu: bool = False

    def packing_s(self, tensor_bytes: int, rate: float) -> float:
        """Return the seconds in which a device packs one tensor and unpacks another, at `rate` bytes per second."""
        return 0.0 if self.codec == "none" else 2.0 * tensor_bytes / rate

    def wires(self, tensor_bytes: int, precision: str) -> tuple[int, int]:
        """Return the bytes of the wire buffers on the (sending, receiving) side of activations of `tensor_bytes`.

        Where nothing is copied, the sender's own tensor is the wire; the gradient that comes back has the same size and
        is the receiver's.
        """
        if not self.copied:
            return 0, tensor_bytes
        one = wire_bytes(tensor_bytes, precision, self.codec)
        mixed = self.before_on_gpu != self.after_on_gpu
        before = pinned_bytes(one) if mixed and not self.before_on_gpu else one
        after = pinned_bytes(one) if mixed and not self.after_on_gpu else one
        return 2 * WIRE_BUFFERS * before, 2 * WIRE_BUFFERS * after


@dataclass(frozen=True)
class StageMemory:
    """Bytes of any run of layers on any stage, for one way of training: what budgets are held against.

    A stage holds its state all the time. Each microbatch in flight keeps what its layers saved, or the inputs of the
    layers that are recomputed, and the stage's output. Workspace is the most that one action needs beyond that; with
    recompute it includes what one layer saves while it is recomputed.

    Attributes:
        layers: what each layer costs.
        loss: what the loss costs, on the last stage.
        in_flight: the most microbatches that each stage holds.
        boundaries: one per boundary.
        precision: "fp16", "bf16" or "fp32".
        deferred: whether the schedule defers weight gradients.
        state: form of the optimizer's state.
    """

    layers: Sequence[LayerCost]
    loss: LayerCost
    in_flight: Sequence[int]
    boundaries: Sequence[Boundary]
    precision: str
    deferred: bool = False
    state: str = "fp32"

    def of(self, stage: int, first: int, last: int, recompute: Collection[int] = ()) -> StageBytes:
        """Return the bytes if `stage` holds layers `first` to `last - 1` and recomputes those in `recompute`."""
        states = [state_bytes(layer, self.precision, first, self.state) for layer in self.layers[first:last]]
        param, main_grad, master, moment = (sum(sizes) for sizes in zip(*states, strict=True))
        return StageBytes(
            param_bytes=param,
            main_grad_bytes=main_grad,
            master_bytes=master,
            moment_bytes=moment,
            saved_bytes=self.in_flight[stage] * self.bound(stage, first, last, recompute),
            wire_bytes=self._wire_bytes(stage, first, last),
            workspace_bytes=self._workspace(stage, first, last, recompute),
        )

    def each(self, stage: int, first: int, last: int, recompute: Collection[int] = ()) -> int:
        """Return the bytes that one microbatch keeps between its forward and its backward."""
        total = 0
        for k in range(first, last):
            layer = self.layers[k]
            total += 0 if k in recompute else layer.own_bytes
            total += layer.input_bytes if self._keeps_input(stage, first, k, recompute) else 0
        if stage < len(self.in_flight) - 1:
            return total + self.layers[last - 1].output_bytes
        kept = self.loss.input_saved or (self.layers[last - 1].output_saved and last - 1 not in recompute)
        return total + self.loss.own_bytes + (self.loss.input_bytes if kept else 0)

    def bound(self, stage: int, first: int, last: int, recompute: Collection[int] = ()) -> int:
        """Return the most bytes that one microbatch keeps, with those of deferred weight gradients beside `each`."""
        total = self.each(stage, first, last, recompute)
        for k in range(first, last) if self.deferred else ():
            total += self.layers[k].left_bytes if k in recompute else self.layers[k].deferred_bytes
        return total

    def held(self, stage: int, first: int, last: int, recompute: Collection[int] = ()) -> MicrobatchBytes:
        """Return the bytes of one microbatch as its layers run, at most those of `of`.

        While a layer runs forward, the layers after it hold nothing yet. While it runs backward, they hold nothing any
        more, except what deferred weight gradients keep and the gradient that came in.
        """
        final = stage == len(self.in_flight) - 1
        tail = 0 if final else self.layers[last - 1].output_bytes
        here, most = 0, 0
        marks = []
        for k in range(first, last):
            layer, recomputed = self.layers[k], k in recompute
            kept = self._keeps_input(stage, first, k, recompute)
            here += (0 if recomputed else layer.own_bytes) + (layer.input_bytes if kept else 0)
            transient = layer.own_bytes if recomputed else 0
            given = layer.input_bytes if k > first and not kept else 0
            most = max(most, here + transient + given + layer.output_bytes + layer.forward_extra_bytes)
            extra = max(layer.backward_extra(self.deferred), layer.forward_extra_bytes if recomputed else 0)
            marks.append(here + transient + extra + (tail if k < last - 1 else 0))
        each = self.each(stage, first, last, recompute)
        if final:
            logits = 0 if each - here - self.loss.own_bytes else self.loss.input_bytes
            most = max(most, each + max(self.loss.forward_extra_bytes + logits, self.loss.backward_extra_bytes))
        left = 0
        for k in reversed(range(first, last)):
            most = max(most, marks[k - first] + tail + left)
            if self.deferred:
                layer = self.layers[k]
                elsewhere = k == first and (stage == 0 or not self.boundaries[stage - 1].copied)
                left += layer.left_bytes + (layer.input_bytes if layer.left_input and not elsewhere else 0)
        bound = self.bound(stage, first, last, recompute) + self._workspace(stage, first, last, recompute)
        return MicrobatchBytes(each, left, max(min(most, bound), each, left))

    def _keeps_input(self, stage: int, first: int, k: int, recompute: Collection[int]) -> bool:
        """Tell whether a microbatch in flight keeps the input of layer `k` in a stage that begins with `first`."""
        layer, recomputed = self.layers[k], k in recompute
        if k > first:
            return recomputed or layer.input_saved or (self.layers[k - 1].output_saved and k - 1 not in recompute)
        # The first stage's input is the user's own batch, which is there anyway.
        return stage > 0 and self.boundaries[stage - 1].copied and (recomputed or layer.input_saved)

    def _workspace(self, stage: int, first: int, last: int, recompute: Collection[int]) -> int:
        layers = enumerate(self.layers[first:last], first)
        most = max(layer.extra_bytes(self.deferred) + (layer.own_bytes if k in recompute else 0) for k, layer in layers)
        if stage == len(self.in_flight) - 1:
            # The logits are kept while the loss is computed.
            most = max(most, self.loss.forward_extra_bytes + self.loss.input_bytes, self.loss.backward_extra_bytes)
        return most

    def _wire_bytes(self, stage: int, first: int, last: int) -> int:
        total = 0
        if stage > 0:
            total += self.boundaries[stage - 1].wires(self.layers[first].input_bytes, self.precision)[1]
        if stage < len(self.in_flight) - 1:
            total += self.boundaries[stage].wires(self.layers[last - 1].output_bytes, self.precision)[0]
        return total
