"""What a layer takes in training: run once on fake tensors exactly as a stage runs it, with every byte counted.

`spu.profile.estimate_layers` costs a layer as plain torch would run it. Here a copy of the layer on fake tensors is put
into the form that training uses (converted, on fused ops, with main gradients and a loss scale), its forward and its
backward are run under `spu.tracker`, and what is live when is read off: what a microbatch leaves behind between the
two, the most that either needs while it runs, and what it computes and moves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from spu import nn as spu_nn
from spu.flops import flop_formulas
from spu.interrupts import stop_if_asked
from spu.ops.cut import cut
from spu.ops.sink import BackwardScope, open_scope
from spu.precision import MainGrads
from spu.profile import LayerCost, fake_copy, frozen_rng
from spu.tracker import MemoryTracker, Tally

__all__ = ["Run", "loss_run", "training_costs"]

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Run:
    """One layer and how it is run.

    Attributes:
        name: the layer's.
        module: holds its parameters, on any device; nothing of it is changed.
        call: ``call(module, x)`` with the module's fake copy; default ``module(x)``.
        alike: layers with an equal, hashable ``alike`` and equal parameters cost the same; None: like no other.
    """

    name: str
    module: nn.Module
    call: Callable[[nn.Module, Any], Any] | None = None
    alike: Any = None


class _Loss(nn.Module):
    def __init__(self, loss_fn: Callable[[Any, Any], torch.Tensor], targets: Any) -> None:
        super().__init__()
        self.how = (loss_fn, targets)

    def forward(self, x: Any) -> torch.Tensor:
        loss_fn, targets = self.how
        value = loss_fn(x, targets)
        return value.to(torch.promote_types(value.dtype, torch.float32)) * 1.0


def loss_run(loss_fn: Callable[[Any, Any], torch.Tensor], targets: Any) -> Run:
    """The loss as a last layer without parameters; ``targets`` are one microbatch's: only their shapes are used."""
    shapes = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), targets)
    return Run("loss", _Loss(loss_fn, shapes))


def training_costs(
    runs: Sequence[Run], sample: Any, dtype: torch.dtype, *, fused: bool | None = None
) -> list[LayerCost]:
    """Costs of layers run one after the other in training.

    Args:
        runs: the layers, in order.
        sample: one microbatch's inputs: a tensor or a structure of them, real, meta or fake.
        dtype: of the training; floating-point parameters, buffers and inputs are taken in it.
        fused: whether linear layers run on our ops; default: in 16-bit precisions, as the trainer does.

    Raises:
        ValueError: there are no layers, or one cannot run without values; the message names it.
    """
    if not runs:
        raise ValueError("there are no layers to cost; give at least one")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tally = Tally()
    x = fake_copy(mode, sample, torch.device("cpu"), dtype)
    known: dict[Any, tuple[LayerCost, Any]] = {}
    owners: dict[int, int] = {}
    costs: list[LayerCost] = []
    with frozen_rng(), torch.enable_grad():
        for run in runs:
            stop_if_asked()
            kind = _kind(run, x)
            if kind is None or kind not in known:
                try:
                    made = _Footprint(mode, tally, run, x, dtype, dtype in _HALVES if fused is None else fused).made()
                except Exception as error:
                    raise ValueError(
                        f"layer {run.name!r} could not be run on fake tensors: {type(error).__name__}: {error}; "
                        "check the example inputs, and that its forward does not read values (.item(), if on a tensor)"
                    ) from error
                if kind is not None:
                    known[kind] = made
            else:
                made = known[kind]
            costs.append(_counted_once(dataclasses.replace(made[0], name=run.name), run.module, owners, len(costs)))
            x = made[1]
    return costs


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
        param_bytes=cost.param_bytes // max(cost.param_count, 1) * (cost.param_count - shared),
        trained_count=(cost.trained_count or 0) - trained,
        ties=tuple((layer, counts[0], counts[1]) for layer, counts in sorted(ties.items())),
    )


def _kind(run: Run, x: Any) -> Any:
    """What decides the costs of a layer that says what it is like; None for one that does not."""
    if run.alike is None:
        return None
    state = itertools.chain(run.module.named_parameters(), run.module.named_buffers())
    shapes = tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in state)
    given = tuple((tuple(t.shape), t.dtype) for t in tree_leaves(x) if isinstance(t, torch.Tensor))
    return (run.alike, shapes, given, run.module.training)


class _Footprint:
    """One layer's run. Local names are dropped as a stage would drop them: what is still referenced is counted."""

    def __init__(self, mode: FakeTensorMode, tally: Tally, run: Run, x: Any, dtype: torch.dtype, fused: bool) -> None:
        self.mode, self.tally, self.run, self.fused = mode, tally, run, fused
        self.x = x
        self.module = _fake_module(run.module, mode, dtype)
        if fused:
            spu_nn.accelerate(self.module)
        self.parameters = list(self.module.parameters())
        self.saved: dict[int, torch.Tensor] = {}

    def made(self) -> tuple[LayerCost, Any]:
        """The cost, and the next layer's input."""
        counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        trainable = [p for p in self.parameters if p.requires_grad]
        with self.mode, MainGrads(trainable) as grads, counter:
            grads.begin_step()
            for parameter in trainable:  # the buffer of an earlier microbatch, which this one adds to
                parameter.grad = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            x = _next(self.x)
            base = self.tally.live
            forward, out = self._forward(x)
            forward_flops = counter.get_total_flops()
            after = _next(out)  # the same shapes, of storages that are not counted here
            backward = self._backward(out, base)
            left, left_input = self._deferred(backward[1]) if self.fused else (0, False)
        keeps, peak, traffic = forward
        backward_peak, backward_work = backward
        input_bytes, output_bytes = _bytes(x), _bytes(after)
        inputs, outputs = _storages(x), _storages(out)
        input_saved = sum(t.untyped_storage().nbytes() for key, t in self.saved.items() if key in inputs)
        output_saved = sum(t.untyped_storage().nbytes() for key, t in self.saved.items() if key in outputs)
        own_output = sum(n for key, n in outputs.items() if key not in inputs)
        by_dtype: dict[str, int] = {}
        for t in self.saved.values():
            name = str(t.dtype).removeprefix("torch.")
            by_dtype[name] = by_dtype.get(name, 0) + t.untyped_storage().nbytes()
        return LayerCost(
            name=self.run.name,
            forward_flops=forward_flops,
            param_bytes=sum(p.numel() * p.element_size() for p in self.parameters),
            param_count=sum(p.numel() for p in self.parameters),
            saved_bytes=sum(by_dtype.values()),
            output_bytes=output_bytes,
            shared_bytes=input_saved,
            saved_by_dtype=tuple(sorted(by_dtype.items())),
            trained_count=sum(p.numel() for p in trainable),
            input_bytes=input_bytes,
            own_bytes=max(keeps - own_output, 0),
            input_saved=input_saved > 0,
            output_saved=output_saved > 0,
            forward_extra_bytes=max(peak - keeps, 0),
            backward_extra_bytes=max(backward_peak - keeps, 0),
            backward_flops=None if backward_work.failed else counter.get_total_flops() - forward_flops,
            forward_traffic_bytes=traffic,
            backward_traffic_bytes=backward_work.moved_bytes,
            deferred_bytes=max(left - max(keeps - own_output, 0), 0),
            deferred_flops=backward_work.deferred_flops,
            left_bytes=left,
            left_input=left_input,
        ), after

    def _forward(self, x: Any) -> tuple[tuple[int, int, int], Any]:
        """(bytes kept, the output's included; most bytes; bytes moved), and the output."""
        state = {t.untyped_storage()._cdata for t in itertools.chain(self.parameters, self.module.buffers())}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in state:
                self.saved[tensor.untyped_storage()._cdata] = tensor.detach()
            return tensor

        started = self.tally.live
        work = _Traffic()
        self.tally.restart()
        with (
            MemoryTracker(self.tally),
            work,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            out = self.module(x) if self.run.call is None else self.run.call(self.module, x)
        return (self.tally.live - started, self.tally.peak - started, work.moved_bytes), out

    def _backward(self, out: Any, base: int) -> tuple[int, _Traffic]:
        """The most bytes, and what was computed."""
        roots = tuple(t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad)
        if not roots:
            return 0, _Traffic()
        one = [torch.ones(1, dtype=torch.float32) for _ in range(3)]
        work = _Traffic()
        self.tally.restart()
        try:
            with MemoryTracker(self.tally), work:
                gradients = [torch.empty_like(root) for root in roots]
                torch.autograd.backward(open_scope(roots, BackwardScope(one[0], one[1], one[2], plain=True)), gradients)
        except Exception:  # a hook that reads values, an op without a fake kernel: what a gradient of each would take
            fallback = _Traffic()
            fallback.failed = True
            return self.tally.live - base + 4 * sum(p.numel() for p in self.parameters) + 2 * _bytes(out), fallback
        return self.tally.peak - base, work

    def _deferred(self, work: _Traffic) -> tuple[int, bool]:
        """Bytes that are held between a backward that puts weight gradients off and those, the layer's input left out;
        and whether they hold the input. In ``work`` only products that are really put off stay counted as such."""
        deferred: list[Callable[[], None]] = []
        one = [torch.ones(1, dtype=torch.float32) for _ in range(3)]
        x = _next(self.x)
        inputs, base, own = Tally(), self.tally.live, _Traffic()
        # The gradient of the input is still there, but is the layer's before: its output's gradient, or a wire.
        passed_on = _bytes([t for t in tree_leaves(x) if isinstance(t, torch.Tensor) and t.requires_grad])
        tree_map_only(torch.Tensor, inputs.add, x)  # no loop: its variable would hold the last one
        with MemoryTracker(self.tally):
            out = self.module(x) if self.run.call is None else self.run.call(self.module, x)
            roots = tuple(t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad)
            if not roots:
                return 0, False
            scope = BackwardScope(one[0], one[1], one[2], deferred=deferred, plain=True)
            try:
                with own:
                    torch.autograd.backward(open_scope(roots, scope), [torch.empty_like(root) for root in roots])
            except Exception:  # as in `_backward`
                return 0, False
            finally:
                del out, roots, x
            work.deferred_flops -= own.deferred_flops  # done at once all the same
            left = max(self.tally.live - base - passed_on, 0), inputs.live > 0
            deferred.clear()
        return left


class _NoModules:
    """In place of the FLOP counter's watch over modules: its global hooks would keep blocks from being run fused."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class _Traffic(TorchDispatchMode):
    """Bytes that operators other than products read and write, and the work of weight gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0
        self.deferred_flops = 0
        self.failed = False
        self._products = set(flop_formulas()) | {getattr(torch.ops.aten, name) for name in _PRODUCTS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        packet = getattr(func, "_overloadpacket", None)
        if packet is not None and packet.__name__ == "linear_dw_":
            self.deferred_flops += 2 * args[0].numel() * args[1].shape[-1]
        if packet in self._products:
            return result
        storages = {t.untyped_storage()._cdata for t in given}
        changes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if changes or any(t.untyped_storage()._cdata not in storages for t in made):
            self.moved_bytes += _bytes([t for t in (*given, *made) if t.device.type != "meta" or t.numel()])
        return result


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "empty", "empty_like", "empty_strided", "new_empty")


def _fake_module(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """New module objects around fake parameters and buffers; those that several places share stay shared."""
    tensors: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor | None, parameter: bool) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            made = fake_copy(mode, tensor, torch.device("cpu"), dtype)
            tensors[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
        return tensors[id(tensor)]

    copies: dict[int, nn.Module] = {}

    def copy(source: nn.Module) -> nn.Module:
        if id(source) not in copies:
            made = copies[id(source)] = source.__new__(type(source))
            made.__dict__ = dict(source.__dict__)
            made._parameters = {name: fake(p, True) for name, p in source._parameters.items()}
            made._buffers = {name: fake(b, False) for name, b in source._buffers.items()}
            made._modules = {name: None if m is None else copy(m) for name, m in source._modules.items()}
        return copies[id(source)]

    with mode:
        return copy(module)


def _next(value: Any) -> Any:
    """The value at the start of a graph of its own, as the input of the next layer, of storages of its own."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return cut(made)[0] if leaf.requires_grad else made

    return tree_map(one, value)


def _storages(value: Any) -> dict[int, int]:
    leaves = (t.untyped_storage() for t in tree_leaves(value) if isinstance(t, torch.Tensor))
    return {storage._cdata: storage.nbytes() for storage in leaves}


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


def alike(module: nn.Module, ignore: Sequence[str] = ("layer_idx", "index")) -> tuple[Any, ...]:
    """What tells one layer's code from another's: classes and plain settings of all its modules, by name."""

    def settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
        for key, value in vars(part).items():
            if key not in ignore and not key.startswith("_") and isinstance(value, str | int | float | bool):
                yield key, value

    return tuple((name, type(part), tuple(sorted(settings(part)))) for name, part in module.named_modules())
