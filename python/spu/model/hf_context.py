"""The keyword inputs that a decoder's base model gives each of its layers, computed without the layers.

A transformers decoder layer takes more than the hidden state: rotary embeddings, masks, positions. The base model's
own `forward` makes them. So that code runs, on a *shell*: a copy of the base model without weights, whose layers are
recorders (return their input, keep the keyword arguments), and whose other children with weights (position embeddings,
norms) have stand-ins. The result does not depend on the values of the hidden states (checked once, in
`hf_structure.py` and `hf_proof.py`). So any stage can compute it alone, from the batch's inputs.
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
from spu.model.hf_stand_ins import LayerCall, Recorder, Stand, StandCall, copy_without_children
from spu.model.packed import check_apart, holds_several, parting_documents, row_lengths, whole
from spu.nn.documents import document_mask

__all__ = ["Context", "Inputs", "is_fake", "same", "split_inputs"]

Inputs = torch.Tensor | dict[str, torch.Tensor]
_KEPT_CONTEXTS = 16  # contexts of that many different (shape, device, dtype) are kept
_ALLOWED_INPUTS = ("input_ids", "attention_mask", "position_ids")


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
        embed_name: name of its token embedding.
        returns: how many values its layers return; 0: the hidden state itself.
    """

    def __init__(self, base: nn.Module, layers_name: str, embed_name: str, *, returns: int = 0) -> None:
        self._layers_name = layers_name
        self._returns = returns
        self._kept_back: set[str] = set()
        self._mixing: int | None = None
        self._template = self._make_shell(base, layers_name, embed_name)
        self._reset()

    def _reset(self) -> None:
        self._proved_apart = False  # that layers keep the documents of packed rows apart
        self._known_masks: dict[Any, bool] = {}  # by length of rows: transformers' mask is ours
        self._needless_masks: dict[Any, bool] = {}  # by shape: transformers makes nothing of one that hides nothing
        self._lock = threading.Lock()
        self._shells: dict[torch.device, nn.Module] = {}
        self._kept: OrderedDict[Any, list[LayerCall]] = OrderedDict()
        self._last = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return self  # holds no weights and no state that a call could change: copies of a layer share it

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_layers_name", "_returns", "_kept_back", "_mixing", "_template")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def keep_back(self, name: str) -> None:
        """Give the base model no input of this name: the model around it does not (Mamba 2: ``position_ids``)."""
        self._kept_back.add(name)
        self._last = threading.local()

    def mixes(self, index: int, mixed: bool) -> None:
        """Note whether a layer lets documents of a row see each other whatever mask it gets: its attention is not all
        that it does along the row (Falcon H1's Mamba). The masks of the few tokens that tell it prove nothing of those
        of longer rows, which are looked at when they come.
        """
        if mixed and self._mixing is None:
            self._mixing = index
        self._proved_apart = False

    def _make_shell(self, base: nn.Module, layers_name: str, embed_name: str) -> nn.Module:
        shell = copy_without_children(base)
        log: list[Any] = []  # copied with the shell
        object.__setattr__(shell, "_spu_log", log)
        for name, child in base.named_children():
            if name == layers_name:
                layers = [Recorder(layer, i, self._returns, log) for i, layer in enumerate(child.children())]
                shell.add_module(name, nn.ModuleList(layers))
            elif next(child.parameters(), None) is not None or next(child.buffers(), None) is None:
                if name != embed_name:
                    shell.add_module(name, Stand(name, child, log))
            else:  # rotary embeddings and the like: tables, no weights
                shell.add_module(name, copy.deepcopy(child))
        return shell

    def _shell_on(self, device: torch.device) -> nn.Module:
        if device not in self._shells:
            self._shells[device] = copy.deepcopy(self._template).to(device)
        return self._shells[device]

    def run(
        self, embeds: torch.Tensor, inputs: Inputs, real: dict[str, nn.Module] | None = None, training: bool = False
    ) -> tuple[list[torch.Tensor], list[LayerCall], torch.Tensor]:
        """Run the shell's forward on `embeds` [batch, tokens, hidden]; gradients flow if they are enabled.

        Args:
            embeds: what the token embedding returns.
            inputs: the microbatch's.
            real: children of the base model that are run themselves, not as stand-ins.
            training: the base model's own dropouts are on.

        Returns:
            (each layer's hidden state, each layer's (args, kwargs), the base model's output)
        """
        return self.watch(embeds, inputs, real, training)[:3]

    def watch(
        self, embeds: torch.Tensor, inputs: Inputs, real: dict[str, nn.Module] | None = None, training: bool = False
    ) -> tuple[list[torch.Tensor], list[LayerCall], torch.Tensor, list[Any]]:
        """Return as `run`, and then the calls of stand-ins and the indices of layers, in their order."""
        unwanted = {"input_ids", *self._kept_back}
        rest = parting_documents({k: v for k, v in split_inputs(inputs).items() if k not in unwanted})
        with self._lock:
            shell = self._shell_on(embeds.device)
            buffers = [id(buffer) for buffer in shell.buffers()]
            log: list[Any] = shell._spu_log  # type: ignore[assignment]
            children = torch_private.children_of(shell)
            stands = {name: children[name] for name in real or ()}
            recorders = list(getattr(shell, self._layers_name))
            try:
                children.update(real or {})
                shell.training = training
                for child in children.values():
                    if isinstance(child, Stand):
                        child.dtype = embeds.dtype
                output = shell(input_ids=None, inputs_embeds=embeds, use_cache=False, **rest)
                taken, seen = [recorder.take() for recorder in recorders], list(log)
            finally:
                children.update(stands)
                log.clear()
                for recorder in recorders:
                    recorder.forget()
                if [id(buffer) for buffer in shell.buffers()] != buffers:
                    # Rotary tables that grow with the longest sequence seen: each batch gets those of a fresh model.
                    del self._shells[embeds.device]
        hidden, calls = [hidden for hidden, _ in taken], [call for _, call in taken]
        return hidden, calls, output[0] if isinstance(output, tuple) else output.last_hidden_state, seen

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
        if extras and self._needless(hidden, rest):
            inputs, extras = rest["input_ids"], []
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
        given = split_inputs(inputs)
        packed, lengths = holds_several(given), row_lengths(given)
        # An evaluation may run under inference_mode: a tensor made there could not be used in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            embeds = torch.zeros((), dtype=dtype, device=device).expand(shape)
            calls = self.run(embeds, inputs)[1] if lengths is None else self._by_lengths(embeds, given, lengths)
        if packed is not None and not self._proved_apart:
            check_apart(calls, packed, self._mixing)
            self._proved_apart = True
        return calls

    def _needless(self, hidden: torch.Tensor, given: dict[str, torch.Tensor]) -> bool:
        """Tell whether inputs are ids and a mask that hides nothing, of which transformers makes what it makes of ids
        alone: proved once for each shape.
        """
        mask = given.get("attention_mask")
        if mask is None or len(given) > 2 or mask.shape != given["input_ids"].shape or not whole(mask):
            return False
        key = hidden.shape, hidden.dtype, hidden.device
        if key not in self._needless_masks:
            with torch.inference_mode(False), torch.no_grad():
                embeds = torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape)
                with_mask, without = (self.run(embeds, x)[1] for x in (given, given["input_ids"]))
            self._needless_masks[key] = same(with_mask, without)
        return self._needless_masks[key]

    def _by_lengths(
        self, embeds: torch.Tensor, given: dict[str, torch.Tensor], lengths: list[list[int]]
    ) -> list[LayerCall]:
        """Return the calls for rows of several documents, or with padding behind one: with a mask of our own where
        transformers' is no other. Its takes ten times as long to make, and waits for a GPU.
        """
        key = embeds.shape[1], embeds.dtype, embeds.device, "position_ids" in given
        known = self._known_masks.get(key)
        if known:
            return self._masked_calls(embeds, given, lengths)
        calls = self.run(embeds, given)[1]
        if known is None:
            rows, of_rows = self._long_rows(embeds, "position_ids" in given)
            two = embeds[:1].expand(2, *embeds.shape[1:])
            self._known_masks[key] = self._gets(calls, embeds, given, lengths) and self._gets(
                self.run(two, rows)[1], two, rows, of_rows
            )
        return calls

    @staticmethod
    def _long_rows(embeds: torch.Tensor, packed: bool) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """Return rows in which a window or a chunk shows that hides something of any row: a document that fills all,
        and one that fills all but one token.
        """
        tokens = embeds.shape[1]
        rows = {"input_ids": torch.zeros(2, tokens, dtype=torch.long, device=embeds.device)}
        if packed:
            rows["position_ids"] = torch.arange(tokens, device=embeds.device).repeat(2, 1)
            rows["position_ids"][0, -1] = 0
            return rows, [[tokens - 1, 1], [tokens]]
        rows["attention_mask"] = torch.ones_like(rows["input_ids"])
        rows["attention_mask"][0, -1] = 0
        return rows, [[tokens - 1], [tokens]]

    def _gets(self, calls: list[LayerCall], *masked: Any) -> bool:
        """Tell whether the layers get the same with a mask of our own, in every argument."""
        try:
            return same(calls, self._masked_calls(*masked))
        except Exception:  # whatever a base model makes of a mask that it does not know
            return False

    def _masked_calls(
        self, embeds: torch.Tensor, given: dict[str, torch.Tensor], lengths: list[list[int]]
    ) -> list[LayerCall]:
        mask = document_mask(lengths, embeds.shape[1], embeds.device)
        return self.run(embeds, given | {"attention_mask": mask})[1]

    def prove_apart(self, inputs: Inputs, width: int) -> None:
        """Raise ValueError if a row holds several documents and the layers, of states ``width`` wide, would not keep
        them apart. One row tells.
        """
        given = split_inputs(inputs)
        packed = None if self._proved_apart else holds_several(given)
        if packed is not None:
            one = {key: value[packed[0] : packed[0] + 1] for key, value in given.items()}
            shape = torch.Size((*one["input_ids"].shape, width))
            self._compute(shape, torch.float32, one["input_ids"].device, one)

    def fake_states(self, embeds: torch.Tensor, real: dict[str, nn.Module]) -> torch.Tensor:
        """Return hidden states like the first layer's for a fake or meta embedding [batch, tokens, width].

        Every child of ``real`` is called once with tensors of the right shapes, so that what it takes can be counted.
        Embeddings are added, all else is applied.
        """
        with unset_fake_temporarily(), torch.no_grad():
            zeros = torch.zeros((), dtype=embeds.dtype, device="cpu").expand(embeds.shape)
            log = self.watch(zeros, torch.zeros(embeds.shape[:2], dtype=torch.long, device="cpu"))[3]
        states, added = embeds, []
        stands = {entry.name: entry for entry in log if isinstance(entry, StandCall)}
        for name, module in real.items():
            if stands[name].embeds:
                args, kwargs = without_values(stands[name].call, embeds)
                added.append(module(*args, **kwargs))
            else:
                states = module(states)
        for positions in added:
            states = states + positions
        return states

    def _fake_layer_calls(self, hidden: torch.Tensor) -> list[LayerCall]:
        """Return the same for a fake or meta hidden state: computed on the CPU for unmasked ids, then converted."""
        with unset_fake_temporarily():
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device="cpu")
            calls = self._compute(torch.Size(hidden.shape), hidden.dtype, torch.device("cpu"), ids)
        return without_values(calls, hidden)  # type: ignore[no-any-return]


def without_values(nested: Any, like: torch.Tensor) -> Any:
    """Return arguments with their tensors replaced by fake or meta ones, as ``like`` is."""
    if not isinstance(like, FakeTensor):
        return tree_map_only(torch.Tensor, lambda t: t.to("meta"), nested)
    mode, device = like.fake_mode, like.fake_device

    def convert(t: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return tree_map_only(torch.Tensor, convert, nested)


def same(a: Any, b: Any) -> bool:
    """Tell whether two arguments are equal, tensors in every element; NaN, of weights that have it, equals NaN."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a is b or a == b)


def is_fake(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
