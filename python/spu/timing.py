"""How long layers take on the devices they may run on: each timed as a stage runs it, on all devices side by side.

Side by side because devices of one host share its memory: a core that works alone is faster than the same core in a
pipeline whose other stages work too.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from spu import ops
from spu.devices import Device, call_pinned
from spu.engine.layers import Layer, Moment
from spu.engine.microbatch import move
from spu.engine.stage import Stage
from spu.footprint import alike
from spu.ops.cut import cut
from spu.ops.sink import BackwardScope
from spu.optim import AdamW
from spu.plan.request import UPDATE_BYTES
from spu.precision import MainGrads
from spu.skips import Rehearsal, carried_by

__all__ = ["Detached", "side_by_side", "time_layers", "time_update"]

Seconds = tuple[float, float]
_UPDATED = 1 << 20  # parameters of the update that is timed


def time_layers(
    layers: Sequence[Layer],
    sample: Any,
    targets: Any,
    devices: Sequence[Device],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    *,
    recompute: Collection[int] = (),
    repeats: int = 5,
) -> list[list[Seconds]]:
    """(forward, backward) seconds of one microbatch of every layer, and last of the loss, on every device.

    Layers that are alike are timed once. Values of parameters and buffers stay as they are; gradients are dropped.

    Args:
        layers: real ones, in the training's precision.
        sample, targets: one microbatch's; without targets the loss counts nothing.
        devices: where.
        loss_fn: as in the trainer.
        recompute: layers that are run again in their backward; their backward seconds are without that forward, which
            planning adds.
        repeats: medians of so many, after an unmeasured one.
    """
    known: dict[Any, tuple[list[Seconds], Any]] = {}
    stashed: dict[str, torch.Tensor] = {}
    rows: list[list[Seconds]] = []
    x = sample
    for index, layer in enumerate(layers):
        again = index in recompute
        key = (_kind(layer, x), again)
        if key not in known:
            known[key] = _time_layer(layer, x, sample, devices, loss_fn, index > 0, again, repeats, stashed)
        seconds, x = known[key]
        rows.append(seconds)
    if targets is None:
        rows.append([(0.0, 0.0)] * len(devices))
    else:
        rows.append(_time_loss(x, targets, devices, loss_fn, repeats))
    return [[row[d] for row in rows] for d in range(len(devices))]


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


def side_by_side(devices: Sequence[Device], body: Callable[[Device, Callable[[], Any]], Any]) -> list[Any]:
    """``body(device, start)`` in a thread pinned to each device; ``start()`` waits until all have got there."""
    barrier = threading.Barrier(len(devices))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def one(index: int, device: Device) -> None:
        try:
            results[index] = call_pinned(device, lambda: body(device, barrier.wait))
        except BaseException as error:
            barrier.abort()
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(devices))]


def _kind(layer: Layer, x: Any) -> Any:
    if not layer.wants_inputs:  # only of decoders' layers is it known that nothing else tells them apart
        return id(layer)
    state = tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in layer.module.parameters())
    given = tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor))
    try:
        hash(kind := (alike(layer.module), state, given))
    except TypeError:
        return id(layer)
    return kind


def _time_layer(
    layer: Layer,
    x: Any,
    inputs: Any,
    devices: Sequence[Device],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    wants_gradient: bool,
    again: bool,
    repeats: int,
    stashed: dict[str, torch.Tensor],
) -> tuple[list[Seconds], Any]:
    """Seconds on each device, and the layer's output."""
    outputs: list[Any] = []
    copies = [dataclasses.replace(layer, module=copy.deepcopy(layer.module)) for _ in devices]

    def body(device: Device, start: Callable[[], None]) -> Seconds:
        own = copies[devices.index(device)]
        own.module.to(device.torch_device)
        stage = Stage(int(wants_gradient), [own], device, is_last=False, loss_fn=loss_fn, recompute=[again])
        here, whole = move(x, device.torch_device), move(inputs, device.torch_device)
        scope = _scope(device)
        carrier = Detached(device.torch_device, stashed)
        with MainGrads(stage.parameters()) as grads, torch.enable_grad(), carried_by(carrier):
            grads.begin_step()

            def once() -> Seconds:
                fresh = pytree.tree_map_only(torch.Tensor, torch.clone, here)  # a layer may change its input in place
                begin = _now(device)
                out = stage.forward(fresh, whole if own.wants_inputs else None, _MOMENT, train=True)
                middle = _now(device)
                leaves = pytree.tree_leaves(out)
                made = [torch.full_like(t, 1e-4) if isinstance(t, torch.Tensor) else None for t in leaves]
                ready = _now(device)
                stage.backward(made, _MOMENT, scope)
                if device is devices[0] and not outputs:
                    outputs.append(pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, out))
                return middle - begin, _now(device) - ready

            forward_s, backward_s = _median(once, start, repeats)
            return forward_s, max(backward_s - forward_s, 0.0) if again else backward_s

    return side_by_side(devices, body), outputs[0]


def _time_loss(
    outputs: Any, targets: Any, devices: Sequence[Device], loss_fn: Callable[[Any, Any], torch.Tensor], repeats: int
) -> list[Seconds]:
    def body(device: Device, start: Callable[[], None]) -> Seconds:
        stage = Stage(1, [], device, is_last=True, loss_fn=loss_fn)
        here, wanted = move(outputs, device.torch_device), move(targets, device.torch_device)
        scope, weight = _scope(device), torch.ones(())

        def once() -> Seconds:
            begin = _now(device)
            with torch.enable_grad():
                out = stage.forward(here, None, _MOMENT, train=True)
                stage.loss(out, wanted, weight, _MOMENT, scope)
            middle = _now(device)
            stage.backward(None, _MOMENT, scope)
            return middle - begin, _now(device) - middle

        return _median(once, start, repeats)

    return side_by_side(devices, body)


_MOMENT = Moment(0, 0, 1)


def _median(once: Callable[[], Seconds], start: Callable[[], None], repeats: int) -> Seconds:
    once()
    start()
    samples = [once() for _ in range(repeats)]
    return statistics.median(s[0] for s in samples), statistics.median(s[1] for s in samples)


def _scope(device: Device) -> BackwardScope:
    one, other, flag = (torch.full((1,), value, device=device.torch_device) for value in (1.0, 1.0, 0.0))
    return BackwardScope(one, other, flag, plain=True)  # matters for fp32 alone, which is trained without a loss scale


def _now(device: Device) -> float:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)
    return time.perf_counter()
