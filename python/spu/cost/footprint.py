"""One layer run forward and backward as a stage runs it, on copies, with every byte counted."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spu import nn as spu_nn
from spu.common import torch_private
from spu.common.fake_ops import FakeOps, fake_tensor
from spu.common.flops import flop_formulas
from spu.common.torch_private import FakeTensor, FakeTensorMode, tree_leaves, tree_map_only
from spu.common.tracker import MemoryTracker, Operators, Tally, Traffic
from spu.model.layers import DrawKey, Layer
from spu.model.stand_in import stand_in
from spu.ops.cut import cut
from spu.ops.sink import BackwardScope, open_scope
from spu.plan.layer_cost import LayerCost
from spu.precision import MainGrads
from spu.skips import Shelf, carried_by

__all__ = ["DetachedSkips", "Footprint", "TrainingForm", "following", "layer_copy", "tensor_bytes", "tensors_in"]


class DetachedSkips(Shelf):
    """Carry skips between layers that are run one by one, perhaps several times: what is popped starts a new graph.

    Args:
        device: where to pop; default where it was stashed.
        tensors: what was stashed, shared with others.
    """

    def __init__(self, device: torch.device | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.device = device
        self.tensors = self.tensors if tensors is None else tensors

    def pop(self, name: str) -> torch.Tensor:
        """Return a stashed tensor, as often as asked."""
        tensor = self.tensors[name] = super().pop(name)
        if self.device is not None and tensor.device != self.device:
            tensor = tensor.to(self.device)
        return cut(tensor.detach())[0] if tensor.requires_grad else tensor


@dataclass(frozen=True)
class TrainingForm:
    """How a layer's copy is made and called, so that it runs as in training.

    Attributes:
        dtypes: as in `layer_copy`.
        fused: put linear layers on our ops.
        deferred: a schedule may defer weight gradients, so that what this keeps is counted too.
        inputs: the microbatch's own, for layers that want them.
        skips: what layers have stashed.
    """

    dtypes: dict[int, torch.dtype]
    fused: bool
    deferred: bool
    inputs: Any
    skips: DetachedSkips

    def copied(self, layer: Layer, mode: FakeTensorMode | None) -> Layer:
        """Return a copy of the layer, on fake tensors of ``mode`` or on real ones."""
        module = layer_copy(layer.module, mode, self.dtypes)
        if self.fused:
            spu_nn.accelerate(module)
        return replace(layer, module=module)

    def run(self, layer: Layer, x: Any) -> Any:
        """Call a layer's copy."""
        with carried_by(self.skips):
            return layer.run(x, self.inputs, DrawKey(0, 0, 1))


class Footprint:
    """One layer's run. Local names are dropped as a stage drops them: what is still referenced is counted.

    Args:
        layer: of the model; a copy of it is run.
        x: its input: fake tensors of ``mode``, or real ones if that is None.
        form: of the copy.
        tally: counts live bytes of all layers' runs.
        mode: run on fake tensors of it; None: on real ones.
    """

    def __init__(self, layer: Layer, x: Any, form: TrainingForm, tally: Tally, mode: FakeTensorMode | None) -> None:
        self.x, self.form, self.tally, self.mode = x, form, tally, mode
        self.layer = form.copied(layer, mode)
        self.parameters = list(self.layer.module.parameters())
        self.saved: dict[int, torch.Tensor] = {}

    def operators(self) -> int:
        """Run the forward alone, and return its number of operators."""
        with on_fakes(self.mode), torch.no_grad(), Operators() as operators:
            self.form.run(self.layer, self.x)
        return operators.count

    def cost(self) -> tuple[LayerCost, Any]:
        """Run the layer, and return its cost and the next layer's input."""
        counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        trainable = [p for p in self.parameters if p.requires_grad]
        with on_fakes(self.mode), MainGrads(trainable) as grads, counter:
            grads.begin_step()
            for parameter in trainable:  # the buffer of an earlier microbatch, which this one adds to
                parameter.grad = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            x = following(self.x)
            base = self.tally.live
            forward, out = self._forward(x)
            forward_flops = counter.get_total_flops()
            after = following(out)  # the same shapes, of storages that are not counted here
            backward_peak, work = self._backward(out, base)
            backward_flops = counter.get_total_flops() - forward_flops if work else 2 * forward_flops
            counts = self.form.fused and self.form.deferred and work
            split = self._deferred() if counts else _Split()
        kept, peak, traffic = forward
        inputs, outputs = _storages(x), _storages(out)
        own = max(kept - sum(n for key, n in outputs.items() if key not in inputs), 0)
        return LayerCost(
            name=self.layer.name,
            param_count=sum(p.numel() for p in self.parameters),
            trained_count=sum(p.numel() for p in trainable),
            own_bytes=own,
            input_bytes=tensor_bytes(x),
            output_bytes=tensor_bytes(after),
            input_saved=not inputs.keys().isdisjoint(self.saved),
            output_saved=not outputs.keys().isdisjoint(self.saved),
            forward_extra_bytes=max(peak - kept, 0),
            backward_extra_bytes=max(backward_peak - kept, 0),
            split_extra_bytes=split.extra,
            deferred_bytes=max(split.left - own, 0),
            left_bytes=split.left,
            left_input=split.left_input,
            forward_flops=forward_flops,
            backward_flops=backward_flops,
            deferred_flops=work.deferred_flops - split.immediate_flops if work else 0,
            forward_traffic_bytes=traffic,
            backward_traffic_bytes=work.moved_bytes if work else 0,
            basis="counted" if self.mode is not None else "measured",
        ), after

    def _forward(self, x: Any) -> tuple[tuple[int, int, int], Any]:
        """Run the forward; return (bytes kept, the output's included; most bytes; bytes moved), and the output."""
        state = {torch_private.storage_id(t) for t in itertools.chain(self.parameters, self.layer.module.buffers())}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if torch_private.storage_id(tensor) not in state:
                self.saved[torch_private.storage_id(tensor)] = tensor.detach()
            # A node that holds its own output is never freed, if its backward does not run.
            return tensor if tensor.is_leaf else tensor.detach()

        started = self.tally.live
        work = Traffic()
        self.tally.restart()
        with MemoryTracker(self.tally), work, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.form.run(self.layer, x)
        return (self.tally.live - started, self.tally.peak - started, work.moved_bytes), out

    def _backward(self, out: Any, base: int) -> tuple[int, Traffic | None]:
        """Run the backward; return the most bytes, and what was computed: None if the backward fails."""
        roots, work = _roots(out), Traffic()
        if not roots:
            return 0, work
        self.tally.restart()
        try:
            with MemoryTracker(self.tally), work:
                self._run_backward(roots)
        except Exception:  # a hook that reads values, an op without a fake kernel: what a gradient of each would take
            gradients = 4 * sum(p.numel() for p in self.parameters) + 2 * tensor_bytes(out)
            return self.tally.live - base + gradients, None
        return self.tally.peak - base, work

    def _run_backward(self, roots: tuple[torch.Tensor, ...], deferred: list[Callable[[], None]] | None = None) -> None:
        gradients = [torch.empty_like(root) for root in roots]
        if self.mode is None:
            gradients = [gradient.fill_(1e-4) for gradient in gradients]
        one, inverse, flag = (torch.ones(1, dtype=torch.float32, device="cpu") for _ in range(3))
        opened = open_scope(roots, BackwardScope(one, inverse, flag, deferred=deferred, plain=True))
        with _spared(roots, self.parameters):
            torch.autograd.backward(opened, gradients)

    def _deferred(self) -> _Split:
        """Run a backward that defers weight gradients."""
        deferred: list[Callable[[], None]] = []
        x = following(self.x)
        inputs, passed_on, base, own = Tally(), Tally(), self.tally.live, Traffic()
        # Where a graph that is kept leads to the input, its gradient is still there, but belongs to the layer before:
        # its output's gradient, or a wire.
        _on_gradients(x, passed_on.add)
        tree_map_only(torch.Tensor, inputs.add, x)  # no loop: its variable would hold the last one
        with MemoryTracker(self.tally):
            out = self.form.run(self.layer, x)
            kept, roots = self.tally.live, _roots(out)
            if not roots:
                return _Split()
            self.tally.restart()
            try:
                with own:
                    self._run_backward(roots, deferred)
            except Exception:  # as in `_backward`
                return _Split()
            finally:
                del out, roots, x
            left = max(self.tally.live - base - passed_on.live, 0)
            found = _Split(self.tally.peak - kept, left, inputs.live > 0, own.deferred_flops)
            deferred.clear()
        return found


def _on_gradients(value: Any, call: Callable[[torch.Tensor], None]) -> None:
    for tensor in tensors_in(value):
        if tensor.requires_grad:
            tensor.register_hook(call)


class _Split(NamedTuple):
    """A backward that leaves weight gradients for later.

    Attributes:
        extra: the most bytes beyond what the forward has left behind.
        left: bytes that what is deferred holds, without the layer's input.
        left_input: whether it holds the input.
        immediate_flops: of weight gradients that were not deferred.
    """

    extra: int = 0
    left: int = 0
    left_input: bool = False
    immediate_flops: int = 0


def _roots(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in tensors_in(out) if t.requires_grad)


class _NoModules(contextlib.nullcontext[None]):
    """Replaces the FLOP counter's watch over modules, whose global hooks would keep blocks from being run fused."""

    parents = ("Global",)


def layer_copy(
    module: Any,
    mode: FakeTensorMode | None = None,
    dtypes: dict[int, torch.dtype] | None = None,
    *,
    share_parameters: bool = False,
) -> Any:
    """Return a stand-in for a module, or for a method of one, on fake tensors or on copies of its own tensors.

    Args:
        module: of a layer, or a loss.
        mode: of the fake tensors; None: real ones.
        dtypes: by id, of parameters and buffers in training; default: a module's as they are. Other tensors are
            replaced where they want gradients.
        share_parameters: let real parameters have the memory of the module's own, which nobody may write meanwhile.
            Those of TorchScript are copied.
    """
    if dtypes is None:
        dtypes = {id(t): t.dtype for t in itertools.chain(module.parameters(), module.buffers())}

    def tensor(source: torch.Tensor) -> torch.Tensor:
        if id(source) not in dtypes and not source.requires_grad:
            return source
        dtype = dtypes.get(id(source), source.dtype)
        if mode is None:
            shared = share_parameters and isinstance(source, nn.Parameter)
            made = source.detach().to(dtype, copy=not shared)
        else:
            made = fake_tensor(mode, source, dtype)
        return made.requires_grad_(source.requires_grad)

    def script(source: torch.jit.ScriptModule) -> nn.Module:
        with torch.no_grad():  # or the copies would be results of the originals, which got their gradients
            made = copy.deepcopy(source)
        for own, original in zip([*made.parameters(), *made.buffers()], [*source.parameters(), *source.buffers()]):
            own.data = own.data.to(dtypes.get(id(original), original.dtype))
            own.requires_grad_(original.requires_grad)
        return made

    with on_fakes(mode):
        return stand_in(module, tensor, script if mode is None else None)


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode | None) -> Iterator[None]:
    """Run operators on fake tensors of ``mode``; on real ones if it is None."""
    if mode is None:
        yield
    else:
        with mode, FakeOps():
            yield


@contextlib.contextmanager
def _spared(roots: tuple[torch.Tensor, ...], own: list[nn.Parameter]) -> Iterator[None]:
    """Let a backward leave no gradient in leaves that are not the layer's own, and call none of their hooks.

    Code may reach parameters that its module does not register: by an enclosing function, or a list of modules.
    """
    mine = {id(parameter) for parameter in own}
    leaves: dict[int, Any] = {}  # torch's stubs have no None for hooks
    nodes, seen = [root.grad_fn for root in roots], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and id(leaf) not in mine:
            leaves[id(leaf)] = leaf
        nodes += [before for before, _ in node.next_functions]
    kept = [
        (t, t.grad, torch_private.backward_hooks(t), torch_private.post_accumulate_hooks(t)) for t in leaves.values()
    ]
    try:
        for leaf in leaves.values():
            leaf.grad = None
            torch_private.set_hooks(leaf, None, None)
        yield
    finally:
        for leaf, gradient, hooks, post_hooks in kept:
            leaf.grad = gradient
            torch_private.set_hooks(leaf, hooks, post_hooks)


def following(value: Any) -> Any:
    """Return the value with storages of its own, at the start of a new graph: the input of the next layer."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            made: torch.Tensor = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        else:
            made = tensor.detach().clone()
        return cut(made)[0] if tensor.requires_grad else made

    return tree_map_only(torch.Tensor, one, value)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a structure, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storages(value: Any) -> dict[int, int]:
    return {torch_private.storage_id(t): t.untyped_storage().nbytes() for t in tensors_in(value)}


def tensor_bytes(value: Any) -> int:
    """Return the bytes of a structure's tensors."""
    return sum(t.numel() * t.element_size() for t in tensors_in(value))
