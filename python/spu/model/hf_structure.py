"""Where a decoder's parts are: embedding, blocks, final norm and head, from its pipeline plan or from its structure.

A causal decoder of transformers is a *holder*, a module with the token embedding, a list of equal blocks and what comes
before and after them (position embeddings, norms, projections), within a model that ends in a language-model head. The
pipeline plan of the config names the list, where there is one; else it is the one `nn.ModuleList` as long as the config
says. What runs before the blocks and what after is seen in a run of the holder's own forward without its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spu.model.hf_context import Context, same
from spu.model.hf_stand_ins import StandCall, unwrapped

__all__ = ["WORKS", "Structure", "structure_of"]

WORKS = (
    "decoders of transformers that are an embedding, a list of layers, a norm and a head work, e.g. InternLM3, Llama, "
    "Qwen3, Mistral, Gemma, Phi3, GPT-2, OPT, BLOOM, Falcon, Mixtral"
)
ELSE = (
    f"{WORKS}. Otherwise give the trainer a list of layers of your own, each an nn.Module that takes what the one "
    "before returns; or train on one device with spu.accelerate(model) and spu.GradScaler"
)


@dataclass(frozen=True)
class Structure:
    """Names of a decoder's parts.

    Attributes:
        holder: path in the model of the module that holds the blocks, such as "model" or "model.decoder".
        embedding, blocks: the holder's children with the token embedding and the list of blocks.
        before, after: the holder's children that run before the blocks (without the embedding) and after them, in
            their order.
        head: path in the model of the language-model head.
        plain: the first block gets what the token embedding returns.
        context: what the holder gives its blocks.
    """

    holder: str
    embedding: str
    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    head: str
    plain: bool
    context: Context


def structure_of(model: nn.Module) -> Structure:
    """Return where the parts of a causal decoder are; its weights are not read.

    Raises:
        ValueError: it has other parts too, or does something else between them; the text says which.
    """
    name = type(model).__name__
    _refuse_others(model)
    holder_path, blocks = _find_blocks(model)
    holder = model.get_submodule(holder_path)
    embedding = _name_of(model.get_input_embeddings(), holder)  # type: ignore[operator]
    if embedding is None:
        raise ValueError(
            f"{name} keeps its token embedding outside {holder_path or 'itself'}, beside its layers; {ELSE}"
        )
    head = _name_of(model.get_output_embeddings(), model)  # type: ignore[operator]
    assert head is not None
    context, before, after, plain = _watched(name, holder, embedding, blocks)
    found = Structure(holder_path, embedding, blocks, before, after, head, plain, context)
    _refuse_strays(model, found)
    return found


def _refuse_others(model: nn.Module) -> None:
    name = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; {ELSE}")
    base = getattr(model, _base_name(model), None)
    if base is None or base is model:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{name} ends in another head than a language model's; {ELSE}")
    if getattr(config.get_text_config(), "_attn_implementation", None) == "flex_attention":
        raise ValueError(
            f"{name} is set to flex attention, which has no backward on CPUs, and whose masks (torch's BlockMask: "
            "functions of positions) cannot be cut into microbatches: model.set_attn_implementation('sdpa')"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"{name} adds a router loss over all layers at once: set config.output_router_logits=False")
    if getattr(config, "layerdrop", 0.0):
        raise ValueError(f"{name} leaves out layers by chance (layerdrop {config.layerdrop}): set config.layerdrop=0.0")


def _base_name(model: Any) -> str:
    """Return the name of the model's base model: a text model of a multimodal family (Llama 4's) names the family's."""
    prefix = str(model.base_model_prefix)
    return "model" if not hasattr(model, prefix) and hasattr(model, "lm_head") else prefix


def _find_blocks(model: Any) -> tuple[str, str]:
    """Return the path of the module that holds the blocks, and the name of their list in it."""
    name, count = type(model).__name__, model.config.get_text_config().num_hidden_layers
    if count < 1:
        raise ValueError(f"{name} has no layers: its config's num_hidden_layers is {count}, give 1 or more")
    prefix = _base_name(model)
    base = getattr(model, prefix)
    planned = [n for n in getattr(model.config, "base_model_pp_plan", None) or () if _is_list(getattr(base, n, None))]
    if len(planned) == 1:
        there = len(getattr(base, planned[0]))
        if there != count:
            raise ValueError(f"{name} has {there} layers but num_hidden_layers says {count}: make the two equal")
        return prefix, planned[0]
    lists = [path for path, module in model.named_modules() if _is_list(module)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    found = [path for path in outer if len(model.get_submodule(path)) == count]
    if len(found) != 1:
        seen = ", ".join(f"{path} ({len(model.get_submodule(path))})" for path in outer) or "none"
        raise ValueError(
            f"{name} should have one list of {count} layers (num_hidden_layers); its lists of modules: {seen}; {ELSE}"
        )
    holder, _, blocks = found[0].rpartition(".")
    return holder, blocks


def _is_list(module: Any) -> bool:
    return isinstance(module, nn.ModuleList)


def _name_of(module: nn.Module | None, parent: nn.Module) -> str | None:
    return next((name for name, child in parent.named_modules() if child is module and name), None)


def _watched(
    name: str, holder: nn.Module, embedding: str, blocks: str
) -> tuple[Context, tuple[str, ...], tuple[str, ...], bool]:
    """Run the holder's forward with stand-ins for all that has weights.

    Returns:
        (the context for its blocks, its children called before them, those called after, whether the first block gets
        the token embedding unchanged)
    """
    if "." in embedding:
        raise ValueError(f"{name} keeps its token embedding in {embedding}, not beside its layers; {ELSE}")
    width = unwrapped(getattr(holder, embedding)).embedding_dim
    problems: list[Exception] = []
    for returns in (0, 1, 2):
        context = Context(holder, blocks, embedding, returns=returns)
        try:
            return (context, *_order(name, context, holder, width))
        except Exception as error:  # of the model's own code, given what its blocks do not return
            problems.append(error)
    first = next((e for e in problems if str(e).startswith(name)), problems[0])
    if isinstance(first, ValueError) and str(first).startswith(name):  # ours
        raise first
    raise ValueError(f"{name} cannot be run without its layers: {first}; {ELSE}") from first


def _order(name: str, context: Context, holder: nn.Module, width: int) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    ids = torch.zeros((1, 4), dtype=torch.long, device="cpu")
    embeds = torch.zeros(1, 4, width, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        other = context.watch(torch.ones_like(embeds), ids)[1]
        given, calls, out, log = context.watch(embeds, ids)
    for index, hidden in enumerate(given):
        if hidden is not given[0]:
            raise ValueError(f"{name} changes hidden states between layers {index - 1} and {index}; {ELSE}")
    if not same(calls, other):
        raise ValueError(f"{name} gives its layers inputs that depend on the embedding; {ELSE}")
    first, last = log.index(0), log.index(len(given) - 1)
    before = [entry for entry in log[:first] if isinstance(entry, StandCall)]
    after = [entry for entry in log[last:] if isinstance(entry, StandCall)]
    names = [entry.name for entry in log if isinstance(entry, StandCall)]
    for stand in names:
        uses = [sum(entry.name == stand for entry in entries) for entries in (before, after)]
        bare = next(holder.get_submodule(stand).parameters(), None) is None  # both ends may have it (NanoChat's norm)
        if sum(uses) != names.count(stand) or max(uses) > 1 or (all(uses) and not bare):
            raise ValueError(f"{name} runs {stand} between its layers, or more than once; {ELSE}")
    end = given[0]
    for entry in after:
        if entry.given is not end:
            raise ValueError(f"{name} changes hidden states between its last layer and {entry.name}; {ELSE}")
        end = entry.returned
    if out is not end and (out.shape != end.shape or out.data_ptr() != end.data_ptr()):
        raise ValueError(f"{name} changes hidden states after its last layer; {ELSE}")
    plain = not before and given[0] is embeds
    return tuple(s.name for s in before), tuple(s.name for s in after), plain


def _refuse_strays(model: nn.Module, found: Structure) -> None:
    """Raise ValueError for a parameter outside the embedding, the layers, what runs beside them, and the head."""
    prefix = f"{found.holder}." if found.holder else ""
    parts = (found.embedding, found.blocks, *found.before, *found.after)
    known = (*(f"{prefix}{part}." for part in parts), f"{found.head}.")
    stray = [name for name, _ in model.named_parameters() if not name.startswith(known)]
    if stray:
        raise ValueError(
            f"{type(model).__name__} has parameters outside its embedding, layers, norm and head "
            f"({', '.join(stray[:3])}); {ELSE}"
        )
