"""What a stage holds in memory, in bytes, by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from spu import schedules

ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Bytes per weight and per activation element, by precision."""

WIRE_BUFFERS = 2  # per boundary and direction: one being filled while the other is read

_HEADER, _ALIGN, _BLOCK = 64, 64, 64  # of the wire format, see spu.ops


@dataclass(frozen=True)
class LayerNeeds:
    """What planning knows of one layer, for one microbatch, in the precision of the training.

    Attributes:
        name: the layer's name.
        params: number of parameters.
        saved_bytes: what the backward needs of the forward.
        shared_bytes: the part of it that the layer before has counted already, if it is on the same stage.
        output_bytes: what goes to the next layer.
        forward_s: seconds of the forward on a device of relative speed 1.
        backward_s: seconds of the backward, recomputation not included.
    """

    name: str
    params: int
    saved_bytes: int
    shared_bytes: int
    output_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class StageBytes:
    """Peak bytes of one stage by category."""

    param_bytes: int
    main_grad_bytes: int
    master_bytes: int
    moment_bytes: int
    saved_bytes: int
    wire_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.param_bytes
            + self.main_grad_bytes
            + self.master_bytes
            + self.moment_bytes
            + self.saved_bytes
            + self.wire_bytes
        )


def wire_bytes(output_bytes: int, precision: str, codec: str) -> int:
    """Bytes on the wire for a tensor of ``output_bytes`` in ``precision``; codec "none" sends it as it is.

    Raises:
        ValueError: for an unknown codec.
    """
    if codec == "none":
        return output_bytes
    count = output_bytes // ITEM_BYTES[precision]
    if codec == "int8":
        return _HEADER + _aligned(4 * -(-count // _BLOCK)) + _aligned(count)
    if codec in ("fp16", "bf16"):
        return _HEADER + _aligned(2 * count)
    raise ValueError(f"unknown codec {codec!r}; there are 'none', 'fp16', 'bf16', 'int8'")


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


class StageMemory:
    """Bytes of any run of layers on any stage, for one way of training.

    Per parameter: the weight in its precision, an fp32 main gradient, an fp32 master weight where weights have 16 bits,
    and two fp32 moments. Activations are what the schedule holds in flight at the stage: each layer's saved tensors,
    or with recompute each layer's input, plus the most that one layer saves while it is being run again. A stage
    also holds its output until the backward comes; the last one an fp32 log-softmax in its place, for the loss. Wires
    are two buffers per boundary and direction.

    Args:
        layers: what each layer needs.
        schedule: name of the schedule.
        stages: number of stages.
        microbatches: per run of the schedule.
        precision: "fp16", "bf16" or "fp32".
        codecs: one per boundary.
        recompute: run each layer's forward again in its backward.
        virtual: stages on each device; None for the schedule's own number.
    """

    def __init__(
        self,
        layers: Sequence[LayerNeeds],
        *,
        schedule: str,
        stages: int,
        microbatches: int,
        precision: str,
        codecs: Sequence[str],
        recompute: bool,
        virtual: int | None = None,
    ) -> None:
        self.layers = layers
        self.precision = precision
        self.codecs = codecs
        self.recompute = recompute
        self.in_flight = _in_flight(schedule, stages, microbatches, virtual)
        self._params = [0, *accumulate(layer.params for layer in layers)]
        self._saved = [0, *accumulate(layer.saved_bytes for layer in layers)]
        self._shared = [0, *accumulate(layer.shared_bytes for layer in layers)]
        self._outputs = [0, *accumulate(layer.output_bytes for layer in layers)]

    def of(self, stage: int, first: int, last: int) -> StageBytes:
        """Bytes if ``stage`` holds layers ``first`` to ``last - 1``."""
        params = self._params[last] - self._params[first]
        item = ITEM_BYTES[self.precision]
        return StageBytes(
            param_bytes=item * params,
            main_grad_bytes=4 * params,
            master_bytes=4 * params if item == 2 else 0,
            moment_bytes=8 * params,
            saved_bytes=self._saved_bytes(stage, first, last),
            wire_bytes=self._wire_bytes(stage, first, last),
        )

    def total(self, stage: int, first: int, last: int) -> int:
        """`of`, summed."""
        return self.of(stage, first, last).total_bytes

    def _saved_bytes(self, stage: int, first: int, last: int) -> int:
        output = self.layers[last - 1].output_bytes
        if stage == len(self.in_flight) - 1:
            output = output // ITEM_BYTES[self.precision] * 4
        if not self.recompute:
            shared = self._shared[last] - self._shared[first + 1]
            return self.in_flight[stage] * (self._saved[last] - self._saved[first] - shared + output)
        # A layer's input is the output of the one before; the first layer's input is the user's own batch.
        inputs = self._outputs[last - 1] - self._outputs[max(first - 1, 0)]
        again = max(layer.saved_bytes for layer in self.layers[first:last])
        return self.in_flight[stage] * (inputs + output) + again

    def _wire_bytes(self, stage: int, first: int, last: int) -> int:
        total = 0
        if stage > 0:
            total += wire_bytes(self.layers[first - 1].output_bytes, self.precision, self.codecs[stage - 1])
        if stage < len(self.in_flight) - 1:
            total += wire_bytes(self.layers[last - 1].output_bytes, self.precision, self.codecs[stage])
        return 2 * WIRE_BUFFERS * total


def _in_flight(schedule: str, stages: int, microbatches: int, virtual: int | None) -> list[int]:
    each = schedules.stages_per_rank(schedule, virtual)
    return schedules.peak_in_flight(schedules.get(schedule)(stages // each, microbatches, virtual=each))
