"""A decoder of transformers read from safetensors, and written, tensor by tensor: beside it, memory holds a piece."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spu.model.convert.empty import materialise, meta_parameters
from spu.model.convert.layout import Layout, Run, Stored, check, fill, whole, write_tensor
from spu.model.convert.shards import DTYPE_NAMES, INDEX, SINGLE, Shards, write_shard
from spu.model.deferred import defer

__all__ = ["empty_decoder", "load_decoder", "save_decoder"]

_OLD_TABLES = re.compile(r"(rotary_emb|rotary_pos_emb|rope)\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FILE_BYTES = 4 << 30
_COPIED = "100MB"  # of files that the safetensors package writes
_EXPERTS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))  # of an expert: gate, up, down


def empty_decoder(config: Any) -> Any:
    """Return the causal decoder of a config with its parameters in fp32 on the meta device.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError: transformers cannot make it.
    """
    from transformers import AutoModelForCausalLM

    with meta_parameters():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)


def load_decoder(folder: Path, config: Any, *, later: bool = False) -> nn.Module | None:
    """Return the decoder of a config with the weights of a folder, in fp32.

    Its tensors are made by ``torch.empty``, which ``spu.spilled`` catches, and filled 16 MB at a time.

    Args:
        later: leave the weights in the folder until `spu.model.deferred.bring`, as a trainer does for its stages.

    Returns:
        the model; None where the checkpoint has other tensors than the model, and transformers knows how to convert
        them.

    Raises:
        ValueError: the checkpoint is damaged or not this model's; the text names the file and the fix.
    """
    shards, model = Shards(folder), empty_decoder(config)
    parameters, ties = dict(model.named_parameters()), set(model.state_dict())
    state = model.state_dict()
    wanted = {name: state[name] for name in state if name in parameters or not state[name].is_meta}
    layout: dict[str, Stored] = {}
    for name, tensor in wanted.items():
        layout.update(_stored(name, tensor, set(shards.entries), model))
    if any(name not in shards.entries for name in layout) and _converts(model):
        return None
    ties |= {name.removeprefix(f"{model.base_model_prefix}.") for name in ties}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def needless(name: str) -> bool:
        return name in ties or _OLD_TABLES.search(name) is not None or any(p.search(name) for p in ignored)

    check(layout, shards, needless)
    if later:
        defer(model, partial(fill, layout, shards))
    else:
        fill(layout, shards, materialise(model))
    _read_generation_config(folder, model)
    return model.eval()  # as from_pretrained


def save_decoder(
    model: Any, folder: Path, values: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> bool:
    """Write a decoder as its ``save_pretrained`` does, the same bytes, without a copy of its weights: 16 MB at a time.

    The safetensors package makes a copy of all that goes into a file. It still writes models whose checkpoints
    transformers converts, and those of several dtypes, in files of 100 MB.

    Args:
        values: of the parameters, by name, where they are not the model's own; each is read when it is written.
        dtype: that these are written in.

    Returns:
        False where such values cannot be written in this way; then nothing was.
    """
    parameters = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    tensors = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if name not in aliases}
    dtypes = {tensor.dtype if name not in parameters or dtype is None else dtype for name, tensor in tensors.items()}
    if _renames(model, tensors) or len(dtypes) != 1 or dtypes.isdisjoint(DTYPE_NAMES):
        if values is None:
            folder.mkdir(parents=True, exist_ok=True)
            _forget_others(folder, ())
            model.save_pretrained(folder, max_shard_size=_COPIED)
        return values is None
    folder.mkdir(parents=True, exist_ok=True)
    (dtype,) = dtypes
    given = tensors if values is None else values
    layout = {name: whole(name, tensor) for name, tensor in sorted(tensors.items())}
    files = _in_files(layout, dtype)
    for file, names in files.items():
        shapes = [(name, layout[name].shape) for name in names]
        write_shard(folder / file, shapes, dtype, lambda name: write_tensor(layout[name], given), {"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        size = sum(stored.numel for stored in layout.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _forget_others(folder, {*files, *((INDEX,) if len(files) > 1 else ())})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return True


def _forget_others(folder: Path, written: Collection[str]) -> None:
    """Remove an earlier save's weights that lie in other files: who reads the folder would take those for the model's,
    transformers one file rather than several, and spu several.
    """
    for file in folder.iterdir():
        if file.name not in written and _WEIGHTS.fullmatch(file.name):
            file.unlink()


def _in_files(layout: Layout, dtype: torch.dtype) -> dict[str, list[str]]:
    """Return which tensors go into which file: one file, or several of `_FILE_BYTES` at most."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, stored in layout.items():
        size += stored.numel * dtype.itemsize
        if size > _FILE_BYTES and groups[-1]:
            groups.append([])
            size = stored.numel * dtype.itemsize
        groups[-1].append(name)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": names for k, names in enumerate(groups, start=1)}


def _stored(name: str, tensor: Tensor, there: set[str], model: Any) -> dict[str, Stored]:
    """Return the stored tensors that a parameter is made of, under the names that they have in the checkpoint."""
    for candidate in _candidates(name, model):
        if candidate in there:
            return {candidate: whole(name, tensor)}
    base, _, kind = name.rpartition(".experts.")
    if kind not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
        return {name: whole(name, tensor)}
    for experts in _candidates(f"{base}.experts", model):
        for gate, up, down in _EXPERTS:
            if f"{experts}.0.{down}.weight" in there:
                return _of_experts(name, tensor, experts, (gate, up) if kind == "gate_up_proj" else (down,))
    return {name: whole(name, tensor)}


def _of_experts(name: str, tensor: Tensor, experts: str, parts: tuple[str, ...]) -> dict[str, Stored]:
    """Return the layout of experts that are stored one by one, and their gate and up matrices apart."""
    count, rows, columns = tensor.shape
    shape = (rows // len(parts), columns)
    size = shape[0] * columns
    return {
        f"{experts}.{expert}.{part}.weight": Stored(shape, (Run(name, (expert * len(parts) + k) * size, size),))
        for expert in range(count)
        for k, part in enumerate(parts)
    }


def _candidates(name: str, model: Any) -> Iterator[str]:
    """Yield the names that a parameter has in checkpoints: its own, without the base model's, older ones, tied ones."""
    yield name
    yield name.removeprefix(f"{model.base_model_prefix}.")
    yield name.replace(".mlp.", ".block_sparse_moe.")  # Mixtral
    yield re.sub(r"^lm_head\.", "embed_out.", name)  # GPT-NeoX
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    for other, parameter in parameters.items():
        if parameter is own and other != name:
            yield other


def _converts(model: Any) -> bool:
    """Tell whether transformers converts this model's checkpoints when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return any(hasattr(step, "operations") for step in get_model_conversion_mapping(model))


def _renames(model: Any, tensors: dict[str, Tensor]) -> bool:
    """Tell whether transformers writes this model's tensors under other names or in other shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    written = revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {name: tensor.shape for name, tensor in written.items()} != shapes


def _read_generation_config(folder: Path, model: Any) -> None:
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
