"""Hugging Face decoders as a list of layers, each an ordinary module that any stage can hold.

The cut follows the model's own `base_model_pp_plan` (token embedding, decoder layers, final norm); the language-model
head and everything the model does after it (logit scaling, softcapping) run through the model's own `forward`.
Running the layers one after the other gives the bits of the whole model, in loss and in gradients.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from spu.common.torch_private import version
from spu.model.hf_context import Context, Inputs, copy_without_children, is_fake, split_inputs
from spu.nn.attention import register_attention, use_attention
from spu.ops.linear import compute_dtype

__all__ = ["DecoderLayer", "Embed", "Head", "decoder_layers", "is_decoder", "register_attention"]

_WORKS = "decoders with a base_model_pp_plan work, e.g. InternLM3, Llama, Qwen2, Qwen3, Mistral, Gemma, Phi3"

_ELSE = (
    f"{_WORKS}. Otherwise give the trainer a list of layers of your own, each an nn.Module that takes what the one "
    "before returns; or train on one device with spu.accelerate(model) and spu.GradScaler"
)


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
    """Token embedding, and the base model's operations before its first layer (such as Gemma's scaling)."""

    def __init__(self, embed_tokens: nn.Module, name: str, context: Context, plain: bool | None) -> None:
        super().__init__({"embed_tokens": name})
        self.embed_tokens = embed_tokens
        self._context = context
        self._plain = plain  # the first layer gets the embedding itself; None: not known, the weights are not there

    def forward(self, x: Inputs, inputs: Inputs | None = None) -> torch.Tensor:
        """Embed token ids int64 [batch, tokens] (or a dict with "input_ids") as states [batch, tokens, hidden]."""
        embeds = self.embed_tokens(split_inputs(x)["input_ids"])
        if self._plain or (self._plain is None and is_fake(embeds)):
            return embeds
        return self._context.run(embeds, x)[0][0]


class DecoderLayer(_Part):
    """One decoder layer with the keyword inputs that the base model would give it."""

    def __init__(self, layer: nn.Module, index: int, name: str, context: Context) -> None:
        super().__init__({"layer": name})
        self.layer = layer
        self.index = index
        self._context = context

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Turn hidden states [batch, tokens, hidden] into the same shape; `inputs`: the microbatch's whole input."""
        args, kwargs = self._context.layer_calls(x, inputs)[self.index]
        out = self.layer(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _BaseOutput(dict):
    """A base model's output, with the fields that a head needs; fields that only inference fills are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else super().__getitem__(key)


class _Stub(nn.Module):
    """Replaces the base model inside the head's shell: returns the hidden state it was made with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
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
    """Final norm, language-model head, and the model's own operations on the logits."""

    def __init__(self, norm: nn.Module, norm_name: str, lm_head: nn.Module, head_name: str, model: nn.Module) -> None:
        super().__init__({"norm": norm_name, "lm_head": head_name})
        self.norm = norm
        self.lm_head = lm_head
        # Not a child: the shell has no weights, and must not show up in state_dict, .to() or .half().
        object.__setattr__(self, "_shell", copy_without_children(model))
        self._head_name = head_name
        self._base_name = str(model.base_model_prefix)

    @property
    def _whole(self) -> nn.Module:
        return self.__dict__["_shell"]

    def forward(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Turn hidden states [batch, tokens, hidden] into logits [batch, tokens, vocabulary]."""
        return self._ended(self.norm(x), self.lm_head, inputs)

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def until_head(self, x: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, bool]:
        """Return what the head is called with, and True; or the logits, and False, if the model changes them."""
        normed = self.norm(x)
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
        shell = copy_without_children(self._whole)  # private to this call: stages run in threads
        shell.add_module(self._base_name, _Stub(normed))
        shell.add_module(self._head_name, lm_head)
        return shell(input_ids=split_inputs(inputs)["input_ids"], use_cache=False, return_dict=True).logits


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
        ValueError: the model is not a causal decoder with a pipeline plan that can be split exactly; the text says why.
    """
    if not is_decoder(model):
        raise ValueError(f"{type(model).__name__} is not a transformers model; {_WORKS}")
    embed_name, layers_name, norm_name = _plan_names(model)
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    base: nn.Module = getattr(model, prefix)
    lm_head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head_name = next(name for name, child in model.named_modules() if child is lm_head)
    _refuse_unplanned(model, prefix, {embed_name, layers_name, norm_name}, head_name)
    use_attention(model)

    context = Context(base, layers_name, norm_name, embed_name)
    embed_tokens = getattr(base, embed_name)
    plain = _check_context(model, context, embed_tokens)
    layers: list[tuple[str, nn.Module]] = [("embed", Embed(embed_tokens, f"{prefix}.{embed_name}", context, plain))]
    for index, layer in enumerate(getattr(base, layers_name)):
        layers.append((f"layers.{index}", DecoderLayer(layer, index, f"{prefix}.{layers_name}.{index}", context)))
    head = Head(getattr(base, norm_name), f"{prefix}.{norm_name}", lm_head, head_name, model)
    return [*layers, ("head", head)]


def _plan_names(model: nn.Module) -> tuple[str, str, str]:
    """Return (embedding, layers, norm): child names of the base model, from its pipeline plan."""
    name = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; {_ELSE}")
    plan = getattr(config, "base_model_pp_plan", None)
    if not plan:
        raise ValueError(f"{name} has no base_model_pp_plan, so nothing says how to split it; {_ELSE}")
    base = getattr(model, str(model.base_model_prefix), None)
    if base is None or base is model:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{name} ends in another head than a language model's, which its pipeline plan leaves out; {_ELSE}"
        )
    names = list(plan)
    if len(names) != 3 or not isinstance(getattr(base, names[1], None), nn.ModuleList):
        raise ValueError(
            f"{name} does more than embed, run layers and normalise: its pipeline plan is {', '.join(names)}; {_ELSE}"
        )
    if len(getattr(base, names[1])) != config.get_text_config().num_hidden_layers:
        raise ValueError(f"{name} has {len(getattr(base, names[1]))} layers but num_hidden_layers says otherwise")
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"{name} adds a router loss over all layers at once: set config.output_router_logits=False")
    return names[0], names[1], names[2]


def _refuse_unplanned(model: nn.Module, prefix: str, planned: set[str], head_name: str) -> None:
    """Raise ValueError for a parameter outside the embedding, the layers, the norm and the head."""
    known = (*(f"{prefix}.{n}." for n in planned), f"{head_name}.")
    stray = [name for name, _ in model.named_parameters() if not name.startswith(known)]
    if stray:
        raise ValueError(
            f"{type(model).__name__} has parameters outside its pipeline plan ({', '.join(stray[:3])}); {_WORKS}"
        )


def _check_context(model: nn.Module, context: Context, embed_tokens: nn.Module) -> bool | None:
    """Prove on four tokens that the shell replaces the base model; return whether layer 0 gets the bare embedding.

    Returns None if the weights are on the meta device, where nothing can be proved.

    Raises:
        ValueError: the base model changes hidden states between layers, or gives its layers something that depends on
            the hidden states.
    """
    name, weight = type(model).__name__, next(embed_tokens.parameters())
    if weight.device.type == "meta":
        return None
    ids = torch.zeros((1, 4), dtype=torch.long, device=weight.device)
    with torch.no_grad():
        embeds = embed_tokens(ids)
        given, calls, out = context.run(embeds, ids)
        if any(h is not given[0] for h in [*given, out]):
            raise ValueError(f"{name} does something to hidden states between its layers; {_WORKS}")
        other = context.run(torch.ones_like(embeds), ids)[1]
    if not _equal(calls, other):
        raise ValueError(f"{name} gives its layers inputs that depend on the embedding; {_WORKS}")
    return given[0] is embeds


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a is b or a == b)
