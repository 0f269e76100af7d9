"""What layers cost and how fast devices are: the numbers that placing a model rests on.

Layers are costed on fake tensors (:func:`estimate_layers`: no weights are read, copied or needed, so a 20B model is
costed on a laptop) or by running them (:func:`measure_layers`). Devices and the links between them are measured once
(:func:`measure_device`, :func:`measure_link`) and remembered under ``$SPU_CACHE`` or ``~/.cache/spu``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spu.common import torch_private
from spu.common.torch_private import FakeTensorMode, tree_leaves, tree_map
from spu.devices import Device, call_pinned
from spu.fake_ops import FakeOps
from spu.flops import flop_formulas
from spu.ops.cut import cut
from spu.speed import DeviceSpeed, cache_directory, measure_device, measure_link
from spu.stand_in import hooks_off
from spu.untouched import frozen_rng, untouched

__all__ = [
    "DeviceSpeed",
    "LayerCost",
    "cache_directory",
    "estimate_layers",
    "measure_device",
    "measure_layers",
    "measure_link",
]

Call = Callable[[nn.Module, Any], Any]
Layers = Iterable["nn.Module | tuple[str, nn.Module]"]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch.

    Attributes:
        name: the layer's.
        forward_flops: of matrix products, convolutions and attention (2 per multiply-add); no elementwise work.
        param_bytes: of its parameters in the dtype it is costed in, a shared one once; buffers are not counted.
        param_count: elements of the same.
        saved_bytes: what forward keeps for backward: distinct storages saved by autograd, parameters and buffers left
            out, the layer's own input included if it is saved.
        output_bytes: of what it hands to the next layer.
        forward_s: measured seconds; None if not measured.
        backward_s: measured seconds of the gradients of inputs and parameters; None if not measured.
        shared_bytes: the part of ``saved_bytes`` that an earlier layer of the same list has counted already (its output
            is saved by both): subtract it where both run in one stage.
        ties: for parameters that earlier layers have too, which the counts above leave out then: (the last of those
            layers, elements, trained elements).
        basis: what the counts rest on: "counted" on fake tensors, "measured" on real ones where a layer reads values,
            or "bound": it could not be run, and its parameters, inputs and outputs bound it.
    """

    name: str
    forward_flops: int
    param_bytes: int
    param_count: int
    saved_bytes: int
    output_bytes: int
    forward_s: float | None = None
    backward_s: float | None = None
    shared_bytes: int = 0
    saved_by_dtype: tuple[tuple[str, int], ...] = ()
    trained_count: int | None = None
    input_bytes: int = 0
    own_bytes: int | None = None
    input_saved: bool = False
    output_saved: bool = False
    forward_extra_bytes: int = 0
    backward_extra_bytes: int = 0
    backward_flops: int | None = None
    forward_traffic_bytes: int = 0
    backward_traffic_bytes: int = 0
    deferred_bytes: int = 0
    deferred_flops: int = 0
    left_bytes: int = 0
    left_input: bool = False
    ties: tuple[tuple[int, int, int], ...] = ()
    basis: str = "counted"


def estimate_layers(
    layers: Layers, example_inputs: Any, call: Call | None = None, *, dtype: torch.dtype | None = None
) -> list[LayerCost]:
    """Costs of ``layers`` run one after the other on fake tensors: shapes and dtypes are computed, values never.

    Args:
        layers: modules, or (name, module) pairs; on any device, ``meta`` too.
        example_inputs: one microbatch's input to the first layer: a tensor or a structure of them, real, meta or fake.
        call: how to call a layer: ``call(layer, x)``; default ``layer(x)``. Real tensors it brings become fake.
        dtype: costs are those of the layers and inputs converted to it (their floating-point tensors); default: as is.

    Raises:
        ValueError: there are no layers, or a layer cannot run without values; the message names it.
    """
    named = _named(layers)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = fake_copy(mode, example_inputs, _device_of(named, example_inputs), dtype)
    seen: set[int] = set()
    keep_alive: list[Any] = []
    costs = []
    layers_only = [layer for _, layer in named]
    with untouched(*layers_only), hooks_off(*layers_only), torch.inference_mode(False):
        for name, layer in named:
            try:
                cost, x = _estimate_one(mode, name, layer, x, call, dtype, seen, keep_alive)
            except Exception as error:
                raise ValueError(
                    f"layer {name!r} could not be run on fake tensors: {type(error).__name__}: {error}; "
                    "check example_inputs, and that its forward does not read values (.item(), if on a tensor)"
                ) from error
            costs.append(cost)
    return costs


def measure_layers(
    layers: Layers,
    example_inputs: Any,
    *,
    call: Call | None = None,
    repeats: int = 3,
    device: Device | torch.device | str | None = None,
) -> list[LayerCost]:
    """:func:`estimate_layers` with seconds: medians of ``repeats`` forwards and backwards after an unmeasured one.

    Leaves parameters' ``.grad``, buffers, random number generators and training modes as they were.

    Args:
        layers: modules or (name, module) pairs.
        example_inputs: one microbatch's input to the first layer, real.
        call: as in :func:`estimate_layers`; its tensors must be where the layers run.
        repeats: at least 1.
        device: where to run: a CPU :class:`Device` runs in a thread with its cores and thread count; layers that are
            elsewhere are copied there one at a time. Default: where they are, in the calling thread.

    Raises:
        ValueError: as :func:`estimate_layers`; or ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; measure at least once")
    named = _named(layers)
    costs = estimate_layers(named, example_inputs, call)
    target = device.torch_device if isinstance(device, Device) else torch.device(device) if device is not None else None

    def body() -> list[LayerCost]:
        x = example_inputs if target is None else _map_tensors(lambda t: t.to(target), example_inputs)
        result = []
        with torch.enable_grad():
            for cost, (_, layer) in zip(costs, named, strict=True):
                forward_s, backward_s, x = _measure_one(_on(layer, target), x, call, repeats)
                result.append(dataclasses.replace(cost, forward_s=forward_s, backward_s=backward_s))
        return result

    layers_only = [layer for _, layer in named]
    with untouched(*layers_only, values=True), frozen_rng(target), hooks_off(*layers_only):
        return call_pinned(device, body) if isinstance(device, Device) else body()


def _named(layers: Layers) -> list[tuple[str, nn.Module]]:
    named = [pair if isinstance(pair, tuple) else (f"{i}.{type(pair).__name__}", pair) for i, pair in enumerate(layers)]
    if not named:
        raise ValueError("there are no layers to cost; give at least one")
    return named


# Estimating.


class _Called(nn.Module):
    """A layer with its way of being called: what functional_call can run with other parameters in place."""

    def __init__(self, layer: nn.Module, call: Call | None) -> None:
        super().__init__()
        self.layer = layer
        # In a tuple, lest it become a submodule, should it be a module.
        self.how = (call,)

    def forward(self, x: Any) -> Any:
        (call,) = self.how
        return self.layer(x) if call is None else call(self.layer, x)


def _estimate_one(
    mode: FakeTensorMode,
    name: str,
    layer: nn.Module,
    x: Any,
    call: Call | None,
    dtype: torch.dtype | None,
    seen: set[int],
    keep_alive: list[Any],
) -> tuple[LayerCost, Any]:
    """The cost of one layer, and the next one's input. ``seen``: storages that earlier layers keep for backward."""
    tensors = _fake_state(mode, layer, _first_device(x), dtype)
    state = {_storage_key(t) for t in tensors.values()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage_key(tensor) not in state:
            saved[_storage_key(tensor)] = tensor.detach()
        return tensor if tensor.is_leaf else tensor.detach()  # a node that holds its own output is never freed

    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mode, FakeOps(), counter, hooks:
        out = torch.func.functional_call(_Called(layer, call), tensors, (x,), strict=False)
    names = [f"layer.{n}" for n, _ in layer.named_parameters(remove_duplicate=False)]
    parameters = list({id(tensors[n]): tensors[n] for n in names}.values())
    cost = LayerCost(
        name=name,
        forward_flops=counter.get_total_flops(),
        param_bytes=sum(p.numel() * p.element_size() for p in parameters),
        param_count=sum(p.numel() for p in parameters),
        saved_bytes=sum(t.untyped_storage().nbytes() for t in saved.values()),
        output_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)),
        shared_bytes=sum(t.untyped_storage().nbytes() for key, t in saved.items() if key in seen),
        saved_by_dtype=_by_dtype(saved.values()),
        input_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(x) if isinstance(t, torch.Tensor)),
    )
    seen.update(saved)
    # Storages are told apart by address, which must not be used again while the list is walked.
    keep_alive.append((saved, out))
    return cost, _next_input(out)


def _by_dtype(saved: Iterable[torch.Tensor]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for tensor in saved:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.untyped_storage().nbytes()
    return tuple(sorted(counts.items()))


def _fake_state(
    mode: FakeTensorMode, layer: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Fake stand-ins for a layer's parameters and buffers; a shared one gets one stand-in under each of its names."""
    made: dict[int, torch.Tensor] = {}
    result = {}
    named = itertools.chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if id(tensor) not in made:
            fake = fake_tensor(mode, tensor, device, dtype)
            made[id(tensor)] = fake.requires_grad_(tensor.requires_grad)
        result[f"layer.{name}"] = made[id(tensor)]
    return result


def fake_tensor(
    mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """A tensor without data of this one's shape and strides, on ``device``; in ``dtype`` if it is a floating one."""
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    with mode:
        if tensor.layout is not torch.strided:  # a sparse one: as many bytes as there can be
            return torch.empty(tensor.shape, dtype=dtype, device=device)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def fake_copy(mode: FakeTensorMode, value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The value with fake tensors of the same shapes on ``device``; floating-point ones in ``dtype`` if given."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return fake_tensor(mode, tensor, device, dtype).requires_grad_(tensor.requires_grad)

    return _map_tensors(one, value)


def _device_of(named: Sequence[tuple[str, nn.Module]], example_inputs: Any) -> torch.device:
    """Where the fake run pretends to be: the first real device among inputs and parameters; the CPU if all is meta."""
    inputs = (t for t in tree_leaves(example_inputs) if isinstance(t, torch.Tensor))
    parameters = (p for _, layer in named for p in layer.parameters())
    devices = (t.device for t in itertools.chain(inputs, parameters))
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def _first_device(x: Any) -> torch.device:
    return next((t.device for t in tree_leaves(x) if isinstance(t, torch.Tensor)), torch.device("cpu"))


def _storage_key(tensor: torch.Tensor) -> int:
    return torch_private.storage_id(tensor)


# Measuring.


def _measure_one(layer: nn.Module, x: Any, call: Call | None, repeats: int) -> tuple[float, float, Any]:
    """Median seconds of forward and of backward, and the input of the next layer."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    device = _first_device([x, *parameters])
    forward_s, backward_s = [], []
    out: Any = None
    with _kept_buffers(layer):
        for _ in range(repeats + 1):
            out = None  # lets go of the last run's activations first
            own = _next_input(_map_tensors(torch.clone, x))  # the layer may change its input in place
            leaves = [t for t in tree_leaves(own) if isinstance(t, torch.Tensor) and t.requires_grad]
            start = _now(device)
            out = layer(own) if call is None else call(layer, own)
            forward_s.append(_now(device) - start)
            outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            gradients = [torch.ones_like(t) for t in outs]
            start = _now(device)
            if outs and (parameters or leaves):
                # Not .backward(): parameters' .grad and their accumulation hooks stay out of it.
                torch.autograd.grad(outs, [*parameters, *leaves], gradients, allow_unused=True)
            backward_s.append(_now(device) - start)
    return statistics.median(forward_s[1:]), statistics.median(backward_s[1:]), _next_input(out)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _on(layer: nn.Module, target: torch.device | None) -> nn.Module:
    """The layer itself if it is on ``target`` (or has no parameters), else a copy there."""
    if target is None or all(t.device == target for t in itertools.chain(layer.parameters(), layer.buffers())):
        return layer
    return copy.deepcopy(layer).to(target)


@contextlib.contextmanager
def _kept_buffers(layer: nn.Module) -> Iterator[None]:
    """Puts buffers back that a forward changes (running statistics)."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _next_input(out: Any) -> Any:
    """``out`` cut from its graph: same storage, wanting a gradient where it had one to give."""
    return _map_tensors(lambda t: cut(t)[0] if t.requires_grad else t.detach(), out)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    return tree_map(lambda t: function(t) if isinstance(t, torch.Tensor) else t, value)
