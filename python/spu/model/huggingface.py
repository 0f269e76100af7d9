"""Hugging Face decoders as a list of layers, each an ordinary module that any stage can hold.

The cut follows the model's own `base_model_pp_plan`, else its structure (`hf_structure.py`): what comes before the
layers (token and position embeddings, norms, projections) is the first part, the final norm and the language-model head
the last, and everything the model does around them (scaling, softcapping) runs through the model's own `forward`.
Running the layers one after the other gives the bits of the whole model, in loss and in gradients; a model for which it
does not is refused (`hf_proof.py`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from spu.common.torch_private import version
from spu.model.deferred import with_any_values
from spu.model.hf_context import Context, Inputs, is_fake, split_inputs
from spu.model.hf_proof import prove_split
from spu.model.hf_stand_ins import LayerCall, copy_without_children, plain_attributes, unwrapped
from spu.model.hf_structure import WORKS, Structure, structure_of
from spu.nn.attention import use_attention
from spu.ops.linear import compute_dtype

__all__ = ["DecoderLayer", "Embed", "Head", "decoder_layers", "is_decoder"]


class _Part(nn.Module):
    """A piece of a decoder that is called with the running tensor and with the microbatch's inputs."""

    wants_inputs = True

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self._names = names  # child name here -> module name in the model

    def parameter_names(self) -> dict[str, str]:
        """Map local state_dict names to the Hugging Face model's own state_dict names."""
        return {key: _renamed(key, self._names) for key in self.state_dict()}


def _renamed(key: str, names: dict[str, str]) -> str:
    child, _, rest = key.partition(".")
    return f"{names[child]}.{rest}"


class Embed(_Part):
    """Token embedding, and all that the base model does before its first layer: scaling, positions, norms."""

    def __init__(self, holder: nn.Module, found: Structure) -> None:
        path = f"{found.holder}." if found.holder else ""
        super().__init__({"embed_tokens": path + found.embedding} | {name: path + name for name in found.before})
        self.embed_tokens = getattr(holder, found.embedding)
        for name in found.before:
            self.add_module(name, getattr(holder, name))
        self._before = found.before
        self._context = found.context
        self._plain = found.plain  # the first layer gets the embedding itself

    def forward(self, x: Inputs, inputs: Inputs | None = None) -> torch.Tensor:
        """Embed token ids int64 [batch, tokens] (or a dict with "input_ids") as states [batch, tokens, hidden]."""
        embeds = self.embed_tokens(split_inputs(x)["input_ids"])
        if self._plain:
            return embeds
        real = {name: self.get_submodule(name) for name in self._before}
        if is_fake(embeds):
            return self._context.fake_states(embeds, real)
        return self._context.run(embeds, x, real, self.training)[0][0]

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise ValueError for rows of several documents that the model's layers would not keep apart."""
        self._context.prove_apart(inputs, unwrapped(self.embed_tokens).embedding_dim)


class DecoderLayer(_Part):
    """One decoder layer with the keyword inputs that the base model would give it."""

    def __init__(self, layer: nn.Module, index: int, name: str, context: Context) -> None:
        super().__init__({"layer": name})
        self.layer = layer
        self.index = index
        self._context = context

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Turn hidden states [batch, tokens, hidden] into the same shape; `inputs`: the microbatch's whole input."""
        args, kwargs = self.arguments(x, inputs)
        out = self.layer(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple | list) else out

    def arguments(self, x: torch.Tensor, inputs: Inputs) -> LayerCall:
        """Return the layer's other arguments, (positional, keywords)."""
        return self._context.layer_calls(x, inputs)[self.index]

    @property
    def context(self) -> Context:
        """What makes its arguments, of all layers."""
        return self._context


class _BaseOutput(dict):
    """A base model's output, with the fields that a head needs; fields that only inference fills are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else super().__getitem__(key)


class _Stub(nn.Module):
    """Replaces the base model inside the head's shell: returns the hidden state it was made with.

    Args:
        hidden: to return.
        attributes: of the base model, which the head's code may read.
    """

    def __init__(self, hidden: torch.Tensor, attributes: dict[str, Any]) -> None:
        super().__init__()
        vars(self).update(attributes)
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _BaseOutput:
        return _BaseOutput(last_hidden_state=self._hidden)


class _NoHead(nn.Module):
    """Replaces the language-model head: keeps what it is called with, and returns logits without values."""

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.weight  # type: ignore[assignment]
        self.hidden: torch.Tensor
        self.logits: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.logits is not None:
            raise ValueError("the head is called twice")
        dtype = compute_dtype(hidden, None) or hidden.dtype  # a cast to this one returns the tensor itself
        self.hidden, shape = hidden, (*hidden.shape[:-1], self.weight.shape[0])
        self.logits = torch.empty(shape, dtype=dtype, device="meta")
        return self.logits


class Head(_Part):
    """What follows the last layer, final norm and projection; the language-model head, and the model's own operations
    on the logits."""

    def __init__(self, model: nn.Module, found: Structure) -> None:
        path = f"{found.holder}." if found.holder else ""
        super().__init__({name: path + name for name in found.after} | {"lm_head": found.head})
        for name in found.after:
            self.add_module(name, model.get_submodule(found.holder).get_submodule(name))
        self.lm_head = model.get_submodule(found.head)
        self._after = found.after
        self._stand_ins = (found.holder, found.head)
        self._attributes = plain_attributes(model.get_submodule(found.holder))
        # Not children: shells have no weights, and must not show up in state_dict, .to() or .half().
        paths = {path.rpartition(".")[0] for path in self._stand_ins} - {""}
        parents = {"", *paths, *(path[:i] for path in paths for i, c in enumerate(path) if c == ".")}
        shells = {path: copy_without_children(model.get_submodule(path)) for path in sorted(parents)}
        object.__setattr__(self, "_shells", shells)

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Turn hidden states [batch, tokens, hidden] into logits [batch, tokens, vocabulary]."""
        return self._ended(self.normed(x), self.lm_head, inputs)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the base model returns for its last layer's hidden states [batch, tokens, hidden]."""
        for name in self._after:
            x = self.get_submodule(name)(x)
        return x

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def until_head(self, x: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, bool]:
        """Return what the head is called with, and True; or the logits, and False, if the model changes them."""
        normed = self.normed(x)
        if not self._ends_in_head(normed.detach(), inputs):
            return self._ended(normed, self.lm_head, inputs), False
        stand_in = _NoHead(self.lm_head)
        self._ended(normed, stand_in, inputs)
        return stand_in.hidden, True

    @torch.no_grad()
    def _ends_in_head(self, normed: torch.Tensor, inputs: Inputs) -> bool:
        """Prove that the model's forward does nothing after its head: given a head that returns a tensor without
        values, it returns that very tensor, unchanged."""
        stand_in = _NoHead(self.lm_head)
        try:
            logits = self._ended(normed, stand_in, inputs)
        except Exception:  # of an operation on the tensor without values
            return False
        return logits is stand_in.logits and version(logits) == 0

    def _ended(self, normed: torch.Tensor, lm_head: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Run the model's forward from the base model's result on, with a head."""
        # Private to this call: stages run in threads.
        shells = {path: copy_without_children(shell) for path, shell in self.__dict__["_shells"].items()}
        for path, shell in shells.items():
            if path:
                _place(shells, path, shell)
        for path, stand_in in zip(self._stand_ins, (_Stub(normed, self._attributes), lm_head), strict=True):
            _place(shells, path, stand_in)
        ids = split_inputs(inputs)["input_ids"]
        return shells[""](input_ids=ids, use_cache=False, return_dict=True).logits  # type: ignore[no-any-return]


def _place(shells: dict[str, nn.Module], path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    shells[parent].add_module(name, module)


def is_decoder(model: object) -> bool:
    """Tell whether a model is from transformers, without importing it; `decoder_layers` says which can be split."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def adapted_base(model: Any) -> nn.Module:
    """Return the model within a PeftModel, whose layers hold the adapters.

    Raises:
        ValueError: the adapter is more than layers of the model: prompts before the input, a term of the loss.
    """
    configs = list(model.peft_config.values())
    kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs]
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise ValueError(f"{kinds[0]} adds prompts to the input outside the model's layers: use LoRA or another tuner")
    if "ADALORA" in kinds:
        raise ValueError("ADALORA adds a term to the loss outside the model's layers: use LoRA or another tuner")
    return model.get_base_model()


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Cut a causal language model into [("embed", Embed), ("layers.0", DecoderLayer), ..., ("head", Head)].

    The parts share the model's modules and parameters (also tied ones); they are called `part(x, inputs)`, where
    `inputs` is the microbatch's input (token ids or a dict with attention_mask, position_ids) and `x` the output of
    the part before (for the first part: `inputs`). The model's attention is switched to the widened equivalent of
    `spu.nn.attention`, in place.

    Rotary tables stay in the precision they have in `model`, whatever the parts are converted to later, as in a model
    that transformers loads in fp16.

    Raises:
        ValueError: the model is not a causal decoder that can be split exactly; the text says why.
    """
    if not is_decoder(model):
        raise ValueError(f"{type(model).__name__} is not a transformers model; {WORKS}")
    found = structure_of(model)
    use_attention(model)
    holder = model.get_submodule(found.holder)
    path = f"{found.holder}.{found.blocks}" if found.holder else found.blocks
    layers: list[tuple[str, nn.Module]] = [("embed", Embed(holder, found))]
    for index, layer in enumerate(getattr(holder, found.blocks)):
        layers.append((f"layers.{index}", DecoderLayer(layer, index, f"{path}.{index}", found.context)))
    layers.append(("head", Head(model, found)))
    for _, part in layers:
        part.training = model.training
    if not any(parameter.is_meta for parameter in model.parameters()):
        with with_any_values(model):
            prove_split(model, layers)
    return layers
