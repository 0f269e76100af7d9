"""How long layers take on the devices they may run on: each timed as a stage runs it, on all devices side by side.

Side by side because devices of one host share its memory: a core that works alone is faster than the same core in a
pipeline whose other stages work too.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spu import ops
from spu.common.dtypes import DTYPES
from spu.common.quiet import hushed
from spu.common.torch_private import pytree
from spu.cost.count import kind_of
from spu.cost.footprint import DetachedSkips, layer_copy
from spu.devices.manager import Device
from spu.devices.pin import call_pinned, side_by_side
from spu.engine.build import to_precision
from spu.engine.head_loss import ends_in_loss
from spu.engine.microbatch import move
from spu.engine.stage import Stage
from spu.memory.disk_store import DiskStore
from spu.memory.slab import Slab
from spu.memory.store import Ticket
from spu.memory.streams import Streams, streams_for
from spu.model.layers import DrawKey, Layer
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched
from spu.ops.sink import BackwardScope
from spu.optim.adamw import AdamW
from spu.optim.forms import FORMS
from spu.plan.memory import update_bytes
from spu.precision import MainGrads
from spu.precision.dtypes import state_dtypes
from spu.skips import carried_by

__all__ = ["time_disk", "time_duplex", "time_layers", "time_packing", "time_update"]

Seconds = tuple[float, float]
_UPDATED = 1 << 20  # parameters of the update that is timed
_REGIONS, _REGION_BYTES = 4, 16 << 20  # of a disk that is timed
_LINK_BYTES = 32 << 20  # of each of two copies at a time
_PACKED = 1 << 18  # values of the tensor that is packed
_OF_A_KIND = 2  # layers of a kind that are run; the weights of a single one would stay in the cache
_SHARED_WEIGHT_BYTES = 1 << 20  # of a weight that lies in the copies' common memory if it has no values
_PERIOD = 8191  # a prime
_SHARED_BYTES = 1 << 28  # of parameters from which a host's devices read the same ones: no cache holds them
_AT_LEAST_S, _MOST = 0.5, 40  # seconds and runs of a chain: quick layers are timed more often


def time_layers(
    layers: Sequence[Layer],
    sample: Any,
    targets: Any,
    devices: Sequence[Device],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    *,
    precision: str,
    fused: bool = False,
    repeats: int = 3,
) -> list[list[Seconds]]:
    """Return (forward, backward) seconds of one microbatch of every layer, and last of the loss, on every device.

    Copies of the layers, one or two of each kind, run as in a stage: all forwards one after the other, the loss, and
    all backwards in reverse. The model itself is only read.

    Args:
        layers: real ones, in any precision.
        sample, targets: one microbatch's; without targets the loss takes 0 s.
        devices: where.
        loss_fn: as in the trainer.
        precision: of the training; copies are converted to it.
        fused: put linear layers on our ops in fp32 too.
        repeats: the least number of runs, after an unmeasured one; their medians are returned.
    """
    kept = untouched(*(layer.module for layer in layers), loss_fn, values=True)
    with kept as watched, hooks_off(), hushed() as hush:

        def prepared() -> _Chain:
            hush()
            with watched():
                joined = targets is not None and ends_in_loss(layers[-1].module, loss_fn)
                return _Chain(layers, sample, devices[0], precision, fused, joined)

        chain = call_pinned(devices[0], prepared)

        def body(device: Device, start: Callable[[], object]) -> list[Seconds]:
            hush()
            own_loss = layer_copy(loss_fn, dtypes={})
            bench = _Bench(chain, device, device is devices[0], sample, targets, own_loss)
            return bench.seconds(start, repeats, watched)

        found = side_by_side(devices, body)
    return [[*(chain.of_layer(own, k) for k in range(len(layers))), own[-1]] for own in found]


def time_disk(folder: Path) -> tuple[float, float]:
    """Return the bytes per second (read, written) of a folder's disk, as a store moves them: checksums included."""
    folder.mkdir(parents=True, exist_ok=True)
    store = DiskStore(folder)
    try:
        regions = store.allocate([f"measured {k}" for k in range(_REGIONS)], [_REGION_BYTES] * _REGIONS)
        slots = Slab(_REGIONS * _REGION_BYTES).slots([_REGION_BYTES] * _REGIONS)

        def rate(move: Callable[[int, torch.Tensor], Ticket]) -> float:
            begin = time.perf_counter()
            for ticket in [move(*both) for both in zip(regions, slots, strict=True)]:
                ticket.wait()
            return _REGIONS * _REGION_BYTES / (time.perf_counter() - begin)

        written = [rate(store.write) for _ in range(4)]
        read = [rate(store.read) for _ in range(3)]
        return statistics.median(read), statistics.median(written[1:])  # the first write makes the file's blocks
    finally:
        store.close()


def time_duplex(device: Device, streams: Streams | None = None) -> float:
    """Return the share of its rate that each direction of a device's link keeps while both are busy: 0.5 to 1.

    Args:
        device: a GPU.
        streams: its queues of copies; default: new ones.
    """
    place = device.torch_device
    streams = streams_for(place) if streams is None else streams
    there = [torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=place) for _ in range(2)]
    here = [
        torch.zeros(_LINK_BYTES, dtype=torch.uint8, pin_memory=place.type == "cuda", device="cpu") for _ in range(2)
    ]
    copies = [(there[0], here[0]), (here[1], there[1])]  # in, out

    def seconds(which: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        found = []
        for _ in range(4):
            begin = time.perf_counter()
            for event in [streams.copy(into, source) for into, source in which]:
                event.synchronize()
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])

    alone = sum(seconds([copy]) for copy in copies) / 2
    return min(1.0, max(0.5, alone / seconds(copies)))


def time_update(devices: Sequence[Device], dtype: torch.dtype, state: str) -> list[float]:
    """Return bytes per second that every device reaches in norm and AdamW with its state in a form.

    They are counted as `update_bytes` per parameter.
    """

    def body(device: Device, start: Callable[[], object]) -> float:
        parameter = torch.nn.Parameter(torch.zeros(_UPDATED // 1024, 1024, dtype=dtype, device=device.torch_device))
        parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        parameter.grad = gradient = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        form: dict[str, Any] = dict(FORMS[state])
        optimizer = AdamW([parameter], **form)
        optimizer.step()

        def update() -> None:
            ops.grad_norm([gradient])
            optimizer.step()

        return update_bytes(state) * parameter.numel() / _median_seconds(device, start, update, 5)

    return side_by_side(devices, body)


def time_packing(devices: Sequence[Device], dtype: torch.dtype, codec: str) -> list[float]:
    """Return bytes of tensor per second that every device packs or unpacks."""

    def body(device: Device, start: Callable[[], object]) -> float:
        x = torch.zeros(_PACKED, dtype=dtype, device=device.torch_device)

        def there_and_back() -> None:
            ops.unpack(ops.pack(x, codec), x.shape, dtype, codec=codec)

        there_and_back()
        return 2 * x.numel() * x.element_size() / _median_seconds(device, start, there_and_back, 9)

    return side_by_side(devices, body)


def _median_seconds(device: Device, start: Callable[[], object], function: Callable[[], None], repeats: int) -> float:
    """Return the median seconds of a call, after ``start()``."""
    times = []
    start()
    for _ in range(repeats):
        begin = _now(device)
        function()
        times.append(_now(device) - begin)
    return max(statistics.median(times), 1e-9)


class _Chain:
    """Copies of up to `_OF_A_KIND` layers of every kind, in order: they are run to time the model.

    Attributes:
        pieces: (layer, its input, the layer's index in the model).
        stashed: tensors of skips.
        joined: the last layer is a piece that makes its loss itself, without logits, as the last stage does.
        last: the model's output; if ``joined``, what the last layer gets.
    """

    def __init__(
        self, layers: Sequence[Layer], sample: Any, device: Device, precision: str, fused: bool, joined: bool
    ) -> None:
        self.pieces: list[tuple[Layer, Any, int]] = []
        self.joined = False
        self.stashed: dict[str, torch.Tensor] = {}
        self._kinds: list[Any] = []  # of each layer
        outputs: dict[Any, Any] = {}
        shared: dict[torch.dtype, torch.Tensor] = {}
        x = move(sample, device.torch_device)
        whole = x
        with torch.no_grad(), carried_by(DetachedSkips(None, self.stashed)):
            for index, layer in enumerate(layers):
                kind = kind_of(layer.module, x)
                if self._kinds.count(kind) < _OF_A_KIND:
                    # Copied in the precision: an fp32 copy can be more than the memory that the model trains in.
                    own = dataclasses.replace(layer, module=layer_copy(layer.module, dtypes=_dtypes(layer, precision)))
                    to_precision([own], precision, {}, fused=fused)
                    _give_values(own.module, shared)
                    own.module.to(device.torch_device)
                    self.pieces.append((own, x, index))
                    self.joined = joined and index == len(layers) - 1
                    if self.joined:  # in fp32 the logits can be larger than all else
                        self._kinds.append(kind)
                        break
                    fresh = pytree.tree_map_only(torch.Tensor, torch.clone, x)  # a layer may change its input in place
                    outputs[kind] = own.run(fresh, whole if own.wants_inputs else None, _KEY)
                self._kinds.append(kind)
                x = outputs[kind]
        self.last = x

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the copies' parameters."""
        return sum(p.numel() * p.element_size() for layer, *_ in self.pieces for p in layer.module.parameters())

    def of_layer(self, seconds: Sequence[Seconds], index: int) -> Seconds:
        """Return the mean of the seconds of those pieces that are of the layer's kind."""
        own = [s for s, (*_, k) in zip(seconds, self.pieces) if self._kinds[k] == self._kinds[index]]
        return statistics.fmean(s[0] for s in own), statistics.fmean(s[1] for s in own)


def _dtypes(layer: Layer, precision: str) -> dict[int, torch.dtype]:
    """Return what parameters and buffers of a layer become in a precision, by id."""
    own = itertools.chain(layer.module.parameters(), layer.module.buffers())
    return {id(t): t.dtype for t in own} | state_dtypes([layer.module], DTYPES[precision])


@torch.no_grad()
def _give_values(module: torch.nn.Module, shared: dict[torch.dtype, torch.Tensor]) -> None:
    """Give weights that are zero, as all are that wait in their files, values to compute with: a processor whose power
    is its limit multiplies zeros faster.

    Large ones lie in one memory for all copies: beside two layers, embedding and head can be more than a streamed
    training holds at a time.

    Args:
        module: a copy.
        shared: that memory by dtype; what is too small is replaced.
    """
    for weight in (p for p in module.parameters() if p.is_floating_point() and p.numel()):
        if weight.dim() < 2:
            if not weight.any():
                weight.fill_(0.5)
        elif not weight[0].any():
            if weight.nbytes < _SHARED_WEIGHT_BYTES or not weight.is_contiguous():
                weight.copy_(_values(weight.numel(), weight.dtype).view_as(weight))
                continue
            if weight.dtype not in shared or shared[weight.dtype].numel() < weight.numel():
                shared[weight.dtype] = _values(weight.numel(), weight.dtype)
            weight.data = shared[weight.dtype][: weight.numel()].view_as(weight)


def _values(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``count`` values of a weight's size, which no two rows of a common width share."""
    made = torch.empty(-(-count // _PERIOD) * _PERIOD, dtype=dtype, device="cpu")
    made.view(-1, _PERIOD).copy_(torch.linspace(-0.03, 0.03, _PERIOD, dtype=torch.float32, device="cpu"))
    return made[:count]


class _Bench:
    """A chain on one device, to be run several times.

    Args:
        chain: of copies.
        device: where to run them.
        own: run them themselves: they are on this device, and nobody else does. Else copies of them.
        inputs, targets, loss_fn: as `time_layers` takes them.
    """

    def __init__(self, chain: _Chain, device: Device, own: bool, inputs: Any, targets: Any, loss_fn: Any) -> None:
        self.device = device
        here = device.torch_device
        self._stages = []
        shared = here.type == "cpu" and chain.parameter_bytes >= _SHARED_BYTES
        for layer, _, index in chain.pieces:
            mine = layer
            if not own:
                mine = dataclasses.replace(layer, module=layer_copy(layer.module, share_parameters=shared).to(here))
            # The input of the model's first layer wants no gradient.
            is_last = chain.joined and index == chain.pieces[-1][2]
            self._stages.append(Stage(min(index, 1), [mine], device, is_last=is_last, loss_fn=loss_fn))
        self._empty = Stage(1, [], device, is_last=False, loss_fn=loss_fn)
        self._loss = Stage(1, [], device, is_last=True, loss_fn=loss_fn)
        self._given = [move(x, here) for _, x, _ in chain.pieces]
        self._last, self._targets = move(chain.last, here), None if targets is None else move(targets, here)
        self._whole = move(inputs, here)
        one, inverse, flag = (torch.tensor([v], dtype=torch.float32, device=here) for v in (1.0, 1.0, 0.0))
        # ``plain`` matters for fp32 alone, which is trained without a loss scale.
        self._scope = BackwardScope(one, inverse, flag, plain=True)
        self._carrier = DetachedSkips(here, chain.stashed)

    def seconds(self, start: Callable[[], object], repeats: int, watched: Callable[[], Any]) -> list[Seconds]:
        """Return medians of each piece, and last of the loss. The first run is made in ``watched()``."""
        parameters = [p for stage in self._stages for p in stage.parameters()]
        with MainGrads(parameters) as grads, torch.enable_grad(), carried_by(self._carrier):
            grads.begin_step()
            with watched():
                self._once()
            start()
            samples: list[list[Seconds]] = []
            deadline = time.perf_counter() + _AT_LEAST_S
            while len(samples) < repeats or (time.perf_counter() < deadline and len(samples) < _MOST):
                samples.append(self._once())
        rows = [
            (statistics.median(s[k][0] for s in samples), statistics.median(s[k][1] for s in samples))
            for k in range(len(samples[0]))
        ]
        # A stage's time is a sum, into which goes what disturbs any of its layers; medians leave that out.
        whole = statistics.median(sum(f + b for f, b in sample) for sample in samples)
        scale = whole / max(sum(f + b for f, b in rows), 1e-9)
        *pieces, loss, empty = [(f * scale, b * scale) for f, b in rows]
        # The time of a stage without layers belongs to no layer.
        return [*((max(f - empty[0], 0.0), max(b - empty[1], 0.0)) for f, b in pieces), loss]

    def _once(self) -> list[Seconds]:
        """Return (forward, backward) seconds of every piece, of the loss, and of a stage without layers."""
        stages = [*self._stages, self._empty]
        forward, outputs = [], []
        for stage, x in zip(stages, [*self._given, self._last]):
            fresh = pytree.tree_map_only(torch.Tensor, torch.clone, x)
            begin = _now(self.device)
            whole = self._whole if stage.wants_inputs else None
            outputs.append(stage.forward(fresh, whole, _KEY, train=True, whole=not stage.is_last))
            forward.append(_now(self.device) - begin)
        joined = next((pair for pair in zip(stages, outputs, strict=True) if pair[0].is_last), None)
        loss = self._run_loss() if joined is None else (self._loss_of(*joined), 0.0)
        backward = []
        for stage, out in zip(reversed(stages), reversed(outputs)):
            leaves = [] if stage.is_last else pytree.tree_leaves(out)  # a loss's gradient is its scale
            made = [torch.full_like(t, 1e-4) if isinstance(t, torch.Tensor) else None for t in leaves]
            begin = _now(self.device)
            stage.backward(made, _KEY, self._scope)
            backward.append(_now(self.device) - begin)
        *pieces, empty = zip(forward, reversed(backward))
        return [*pieces, loss, empty]

    def _run_loss(self) -> Seconds:
        if self._targets is None:
            return 0.0, 0.0
        begin = _now(self.device)
        out = self._loss.forward(self._last, None, _KEY, train=True)
        self._loss_of(self._loss, out)
        middle = _now(self.device)
        self._loss.backward(None, _KEY, self._scope)
        return middle - begin, _now(self.device) - middle

    def _loss_of(self, stage: Stage, out: Any) -> float:
        """Make a stage's loss; return its seconds."""
        begin = _now(self.device)
        stage.loss(out, self._targets, torch.ones((), dtype=torch.float32, device="cpu"), _KEY, self._scope)
        return _now(self.device) - begin


_KEY = DrawKey(0, 0, 1)


def _now(device: Device) -> float:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    return time.perf_counter()
