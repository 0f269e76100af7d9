"""The keyword inputs that a decoder's base model gives each of its layers, computed without the layers.

A transformers decoder layer takes more than the hidden state: rotary embeddings, masks, positions. The base model's
own `forward` makes them. So that code runs, on a *shell*: a copy of the base model without weights, whose layers are
recorders (return their input, keep the keyword arguments) and whose final norm is the identity. The result does not
depend on the values of the hidden states (checked once, in `huggingface.py`). So any stage can compute it alone, from
the batch's inputs.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.common.torch_private import FakeTensor, tree_map_only, unset_fake_temporarily

__all__ = ["Context", "Inputs", "LayerCall", "Recorder", "copy_without_children", "is_fake", "split_inputs"]

Inputs = torch.Tensor | dict[str, torch.Tensor]
LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
_KEPT_CONTEXTS = 16  # contexts of that many different (shape, device, dtype) are kept
_ALLOWED_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Recorder(nn.Module):
    """Replaces a decoder layer: returns its input and records its arguments.

    Plain attributes of the layer (such as its attention type) are copied, because a base model's forward may read them.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for key, value in vars(layer).items():
            if not key.startswith("_") and isinstance(value, str | int | float | bool | type(None)):
                setattr(self, key, value)
        self._calls: list[tuple[torch.Tensor, LayerCall]] = []

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._calls.append((hidden, (args, kwargs)))
        return hidden

    def take(self) -> tuple[torch.Tensor, LayerCall]:
        """Return the one call since the last `take`: (hidden state, (args, kwargs))."""
        calls = self._calls
        self._calls = []
        if len(calls) != 1:
            raise ValueError(f"the base model calls a decoder layer {len(calls)} times in one forward: not supported")
        return calls[0]


def copy_without_children(module: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` with new tables of children, parameters and buffers, and no child."""
    clone = copy.copy(module)
    buffers = {k: b if b is None else b.detach().clone() for k, b in torch_private.buffers_of(module).items()}
    torch_private.set_tables(clone, dict(torch_private.parameters_of(module)), buffers, {})
    return clone


def split_inputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return a microbatch's inputs as a dict: "input_ids" and, if given, "attention_mask" and "position_ids"."""
    if isinstance(inputs, torch.Tensor):
        return {"input_ids": inputs}
    if not isinstance(inputs, dict) or "input_ids" not in inputs:
        what = f"a dict with {sorted(inputs)}" if isinstance(inputs, dict) else type(inputs).__name__
        raise TypeError(f"inputs of a decoder must be a tensor of input_ids or a dict with 'input_ids', got {what}")
    unknown = sorted(set(inputs) - set(_ALLOWED_INPUTS))
    if unknown:
        raise ValueError(f"inputs of a decoder may hold {', '.join(_ALLOWED_INPUTS)}; remove {', '.join(unknown)}")
    return {k: v for k, v in inputs.items() if v is not None}


class Context:
    """Keyword inputs of every decoder layer of one model, per device; safe to call from many threads.

    Args:
        base: the base model; it is not changed and none of its weights are kept.
        layers_name: name of its ModuleList of decoder layers.
        norm_name: name of its final norm.
        embed_name: name of its token embedding.
    """

    def __init__(self, base: nn.Module, layers_name: str, norm_name: str, embed_name: str) -> None:
        self._layers_name = layers_name
        self._template = self._make_shell(base, layers_name, norm_name, embed_name)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._shells: dict[torch.device, nn.Module] = {}
        self._kept: OrderedDict[Any, list[LayerCall]] = OrderedDict()
        self._last = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return self  # holds no weights and no state that a call could change: copies of a layer share it

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers_name": self._layers_name, "_template": self._template}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @staticmethod
    def _make_shell(base: nn.Module, layers_name: str, norm_name: str, embed_name: str) -> nn.Module:
        shell = copy_without_children(base)
        for name, child in base.named_children():
            if name == layers_name:
                shell.add_module(name, nn.ModuleList(Recorder(layer) for layer in child.children()))
            elif name == norm_name:
                shell.add_module(name, nn.Identity())
            elif name != embed_name:  # rotary embeddings and the like: buffers, no weights
                shell.add_module(name, copy.deepcopy(child))
        return shell

    def _shell_on(self, device: torch.device) -> nn.Module:
        if device not in self._shells:
            self._shells[device] = copy.deepcopy(self._template).to(device)
        return self._shells[device]

    def run(self, embeds: torch.Tensor, inputs: Inputs) -> tuple[list[torch.Tensor], list[LayerCall], torch.Tensor]:
        """Run the shell's forward on `embeds` [batch, tokens, hidden]; gradients flow if they are enabled.

        Returns:
            (each layer's hidden state, each layer's (args, kwargs), the base model's output)
        """
        rest = split_inputs(inputs)
        rest = {k: v for k, v in rest.items() if k != "input_ids"}
        with self._lock:
            shell = self._shell_on(embeds.device)
            output = shell(input_ids=None, inputs_embeds=embeds, use_cache=False, **rest)
            recorders = getattr(shell, self._layers_name)
            taken = [r.take() for r in recorders]
        return [hidden for hidden, _ in taken], [call for _, call in taken], output.last_hidden_state

    def layer_calls(self, hidden: torch.Tensor, inputs: Inputs) -> list[LayerCall]:
        """Return the (args, kwargs) of every layer for a hidden state [batch, tokens, hidden] of `inputs`.

        Cached per (shape, dtype, device) when the inputs are token ids alone; else for the last inputs of each thread.
        """
        if is_fake(hidden):
            return self._fake_layer_calls(hidden)
        rest = split_inputs(inputs)
        stream = torch.cuda.current_stream(hidden.device).cuda_stream if hidden.is_cuda else 0
        key = (hidden.shape, hidden.dtype, hidden.device, stream)
        extras = [v for k, v in rest.items() if k != "input_ids"]
        if extras:
            return self._last_or_new(key, hidden, inputs, extras)
        with self._lock:
            kept = self._kept.get(key)
        if kept is None:
            kept = self._compute(hidden.shape, hidden.dtype, hidden.device, inputs)
            with self._lock:
                self._kept[key] = kept
                while len(self._kept) > _KEPT_CONTEXTS:
                    self._kept.popitem(last=False)
        return kept

    def _last_or_new(
        self, key: Any, hidden: torch.Tensor, inputs: Inputs, extras: list[torch.Tensor]
    ) -> list[LayerCall]:
        # All layers of a stage ask with the same tensors, one after the other: the work is done for the first.
        last = getattr(self._last, "value", None)
        seen = [(id(t), torch_private.version(t)) for t in extras]
        if last is not None and last[:2] == (key, seen) and all(ref() is not None for ref in last[2]):
            return last[3]
        calls = self._compute(hidden.shape, hidden.dtype, hidden.device, inputs)
        self._last.value = (key, seen, [weakref.ref(t) for t in extras], calls)
        return calls

    def _compute(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, inputs: Inputs) -> list[LayerCall]:
        # An evaluation may run under inference_mode: a tensor made there could not be used in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            embeds = torch.zeros((), dtype=dtype, device=device).expand(shape)
            return self.run(embeds, inputs)[1]

    def _fake_layer_calls(self, hidden: torch.Tensor) -> list[LayerCall]:
        """Return the same for a fake or meta hidden state: computed on the CPU for unmasked ids, then converted."""
        with unset_fake_temporarily():
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
            calls = self._compute(torch.Size(hidden.shape), hidden.dtype, torch.device("cpu"), ids)
        if isinstance(hidden, FakeTensor):
            mode, device = hidden.fake_mode, hidden.fake_device

            def convert(t: torch.Tensor) -> torch.Tensor:
                with mode:
                    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

            return tree_map_only(torch.Tensor, convert, calls)
        return tree_map_only(torch.Tensor, lambda t: t.to("meta"), calls)


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
