"""How long layers take on the devices they may run on: each timed as a stage runs it, on all devices side by side.

Side by side because devices of one host share its memory: a core that works alone is faster than the same core in a
pipeline whose other stages work too.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spu import ops
from spu.common.quiet import hushed
from spu.common.torch_private import pytree
from spu.cost.count import kind_of
from spu.cost.rehearsal import layer_copy
from spu.devices.manager import Device, call_pinned
from spu.devices.side_by_side import side_by_side
from spu.engine.build import to_precision
from spu.engine.microbatch import move
from spu.engine.stage import Stage
from spu.model.layers import Layer, Moment
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched
from spu.ops.cut import cut
from spu.ops.sink import BackwardScope
from spu.optim.adamw import AdamW
from spu.plan.request import UPDATE_BYTES
from spu.precision import MainGrads
from spu.skips import Rehearsal, carried_by

__all__ = ["Detached", "time_layers", "time_packing", "time_update"]

Seconds = tuple[float, float]
_UPDATED = 1 << 20  # parameters of the update that is timed
_PACKED = 1 << 18  # values of the tensor that is packed
_OF_A_KIND = 2  # layers of a kind that are run; the weights of a single one would stay in the cache
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
    """(forward, backward) seconds of one microbatch of every layer, and last of the loss, on every device.

    Copies of the layers, one or two of each kind, run as in a stage: all forwards one after the other, the loss, and
    all backwards in reverse. The model itself is only read.

    Args:
        layers: real ones, in any precision.
        sample, targets: one microbatch's; without targets the loss counts nothing.
        devices: where.
        loss_fn: as in the trainer.
        precision: that the copies are converted to.
        fused: put linear layers on our ops in fp32 too.
        repeats: medians of at least so many, after an unmeasured one.
    """
    kept = untouched(*(layer.module for layer in layers), loss_fn, values=True)
    with kept as watched, hooks_off(), hushed() as hush:

        def prepared() -> _Chain:
            hush()
            with watched():
                return _Chain(layers, sample, devices[0], precision, fused)

        chain = call_pinned(devices[0], prepared)

        def body(device: Device, start: Callable[[], None]) -> list[Seconds]:
            hush()
            bench = _Bench(chain, device, sample, targets, _own_loss(loss_fn))
            return bench.seconds(start, repeats, watched)

        found = side_by_side(devices, body)
    return [[*(chain.of_layer(own, k) for k in range(len(layers))), own[-1]] for own in found]


class Detached(Rehearsal):
    """Skips between layers that are run one by one: what is popped starts a graph of its own.

    Args:
        device: where to pop; default where it was stashed.
        tensors: what was stashed, shared with others.
    """

    def __init__(self, device: torch.device | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.device = device
        self.tensors = self.tensors if tensors is None else tensors

    def pop(self, name: str) -> torch.Tensor:
        tensor = super().pop(name)
        if self.device is not None and tensor.device != self.device:
            tensor = tensor.to(self.device)
        return cut(tensor.detach())[0] if tensor.requires_grad else tensor


def time_update(devices: Sequence[Device], dtype: torch.dtype, repeats: int = 5) -> list[float]:
    """Bytes per second that every device reaches in norm and AdamW, counted as `UPDATE_BYTES` per parameter."""

    def body(device: Device, start: Callable[[], None]) -> float:
        parameter = torch.nn.Parameter(torch.zeros(_UPDATED // 1024, 1024, dtype=dtype, device=device.torch_device))
        parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        parameter.grad = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        optimizer = AdamW([parameter])
        optimizer.step()
        times = []
        start()
        for _ in range(repeats):
            begin = _now(device)
            ops.grad_norm([parameter.grad])
            optimizer.step()
            times.append(_now(device) - begin)
        return UPDATE_BYTES * parameter.numel() / max(statistics.median(times), 1e-9)

    return side_by_side(devices, body)


def time_packing(devices: Sequence[Device], dtype: torch.dtype, codec: str, repeats: int = 9) -> list[float]:
    """Bytes of tensor per second that every device packs or unpacks."""

    def body(device: Device, start: Callable[[], None]) -> float:
        x = torch.zeros(_PACKED, dtype=dtype, device=device.torch_device)
        wire = ops.pack(x, codec)
        times = []
        start()
        for _ in range(repeats):
            begin = _now(device)
            ops.unpack(ops.pack(x, codec), x.shape, dtype, codec=codec)
            times.append(_now(device) - begin)
        del wire
        return 2 * x.numel() * x.element_size() / max(statistics.median(times), 1e-9)

    return side_by_side(devices, body)


@dataclasses.dataclass
class _Piece:
    """A copy of a layer that stands for its kind, and what it was given."""

    layer: Layer
    x: Any
    first: bool  # the model's: its input wants no gradient


class _Chain:
    """What is run to time a model: up to `_OF_A_KIND` layers of every kind, in order."""

    def __init__(self, layers: Sequence[Layer], sample: Any, device: Device, precision: str, fused: bool) -> None:
        self.pieces: list[_Piece] = []
        self.stashed: dict[str, torch.Tensor] = {}
        self._kinds: list[Any] = []  # of each piece
        self._of: list[Any] = []  # of each layer
        outputs: dict[Any, Any] = {}
        x = move(sample, device.torch_device)
        whole = x
        carrier = Detached(None, self.stashed)
        with torch.no_grad(), carried_by(carrier):
            for index, layer in enumerate(layers):
                kind = kind_of(layer.module, x)
                self._of.append(kind)
                if self._kinds.count(kind) < _OF_A_KIND:
                    module = layer_copy(layer.module)
                    own = dataclasses.replace(layer, module=module)
                    to_precision([own], precision, fused=fused)
                    own.module.to(device.torch_device)
                    self.pieces.append(_Piece(own, x, index == 0))
                    self._kinds.append(kind)
                    fresh = pytree.tree_map_only(torch.Tensor, torch.clone, x)  # a layer may change its input in place
                    outputs[kind] = own.run(fresh, whole if own.wants_inputs else None, _MOMENT)
                x = outputs[kind]
        self.last = x

    def of_layer(self, seconds: Sequence[Seconds], index: int) -> Seconds:
        """The mean of the pieces of a layer's kind."""
        own = [s for s, kind in zip(seconds, self._kinds) if kind == self._of[index]]
        return statistics.fmean(s[0] for s in own), statistics.fmean(s[1] for s in own)


class _Holder(torch.nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = (held,)


def _own_loss(loss_fn: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """The loss; a copy of it if it is a module, or a method of one."""
    own: Any = layer_copy(_Holder(loss_fn))
    return own.held[0]


class _Bench:
    """A chain on one device, ready to be run again and again."""

    def __init__(self, chain: _Chain, device: Device, inputs: Any, targets: Any, loss_fn: Any) -> None:
        self.device = device
        home = device.torch_device
        pieces = [dataclasses.replace(p.layer, module=layer_copy(p.layer.module).to(home)) for p in chain.pieces]
        self._stages = [
            Stage(int(not piece.first), [own], device, is_last=False, loss_fn=loss_fn)
            for piece, own in zip(chain.pieces, pieces)
        ]
        self._empty = Stage(1, [], device, is_last=False, loss_fn=loss_fn)
        self._loss = Stage(1, [], device, is_last=True, loss_fn=loss_fn)
        self._given = [move(piece.x, home) for piece in chain.pieces]
        self._last, self._targets = move(chain.last, home), None if targets is None else move(targets, home)
        self._whole = move(inputs, home)
        self._scope = _scope(device)
        self._carrier = Detached(home, chain.stashed)

    def seconds(self, start: Callable[[], None], repeats: int, watched: Callable[[], Any]) -> list[Seconds]:
        """Medians of each piece, and last of the loss. The first run is made in ``watched()``."""
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
        # What a stage takes beside its layers is not each layer's.
        return [*((max(f - empty[0], 0.0), max(b - empty[1], 0.0)) for f, b in pieces), loss]

    def _once(self) -> list[Seconds]:
        """(forward, backward) of every piece, of the loss, and of a stage without layers."""
        stages = [*self._stages, self._empty]
        forward, outputs = [], []
        for stage, x in zip(stages, [*self._given, self._last]):
            fresh = pytree.tree_map_only(torch.Tensor, torch.clone, x)
            begin = _now(self.device)
            outputs.append(stage.forward(fresh, self._whole if stage.wants_inputs else None, _MOMENT, train=True))
            forward.append(_now(self.device) - begin)
        loss = self._run_loss()
        backward = []
        for stage, out in zip(reversed(stages), reversed(outputs)):
            made = [torch.full_like(t, 1e-4) if isinstance(t, torch.Tensor) else None for t in pytree.tree_leaves(out)]
            begin = _now(self.device)
            stage.backward(made, _MOMENT, self._scope)
            backward.append(_now(self.device) - begin)
        *pieces, empty = zip(forward, reversed(backward))
        return [*pieces, loss, empty]

    def _run_loss(self) -> Seconds:
        if self._targets is None:
            return 0.0, 0.0
        begin = _now(self.device)
        out = self._loss.forward(self._last, None, _MOMENT, train=True)
        self._loss.loss(out, self._targets, torch.ones((), dtype=torch.float32), _MOMENT, self._scope)
        middle = _now(self.device)
        self._loss.backward(None, _MOMENT, self._scope)
        return middle - begin, _now(self.device) - middle


_MOMENT = Moment(0, 0, 1)


def _scope(device: Device) -> BackwardScope:
    values = ([value] for value in (1.0, 1.0, 0.0))
    one, other, flag = (torch.tensor(value, dtype=torch.float32, device=device.torch_device) for value in values)
    return BackwardScope(one, other, flag, plain=True)  # matters for fp32 alone, which is trained without a loss scale


def _now(device: Device) -> float:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    return time.perf_counter()
