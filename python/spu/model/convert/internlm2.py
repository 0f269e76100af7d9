"""InternLM2 checkpoints without their remote code: read into a Llama of transformers, and written back byte for byte.

InternLM2 (1.8B, 7B, 20B, 2.5) is Llama's architecture under other names, with queries, keys and values in one matrix
``wqkv``. Its rows go by key head: the queries of the heads that share the key, then the key, then the value. Its
dynamic NTK scaling of rotary embeddings is transformers' ``dynamic`` one: for sequences longer than
``max_position_embeddings`` the base is multiplied by ``(factor * length / max_position_embeddings - (factor - 1)) **
(d / (d - 2))`` (`modeling_internlm2.py` of the checkpoints).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spu.model.convert.decoder import empty_decoder
from spu.model.convert.empty import materialise
from spu.model.convert.layout import Layout, Run, Stored, check, fill, whole, write_tensor
from spu.model.convert.shards import DTYPE_NAMES, INDEX, Shards, write_shard
from spu.model.deferred import defer

__all__ = ["MODEL_TYPE", "Checkpoint", "internlm2_config", "layout_of", "load_internlm2"]

MODEL_TYPE = "internlm2"
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KEPT = {  # fields of the same name and meaning in Llama's config, and InternLM2's defaults
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_SCALINGS = ("dynamic", "linear")


def internlm2_config(values: Mapping[str, Any], source: str) -> Any:
    """Return the Llama config of an InternLM2 config.json.

    Args:
        values: of the JSON object.
        source: for errors.

    Raises:
        ValueError: a field is missing, or has a value that Llama cannot represent.
    """
    from transformers import LlamaConfig

    missing = [name for name in _NEEDED if type(values.get(name)) is not int or values[name] < 1]
    if missing:
        raise ValueError(
            f"--model {source}: config.json has no {', '.join(missing)} (a whole number above 0), which InternLM2 "
            "needs; copy the config of the weights"
        )
    own: dict[str, Any] = {name: values[name] for name in _NEEDED}
    own |= {name: values.get(name, default) for name, default in _KEPT.items()}
    bias = bool(values.get("bias", True))
    own |= {"attention_bias": bias, "mlp_bias": False, "rope_theta": float(values.get("rope_theta", 10000))}
    own["rope_scaling"] = _scaling(values.get("rope_scaling"), source)
    heads, keys = own["num_attention_heads"], own["num_key_value_heads"] or own["num_attention_heads"]
    if own["hidden_size"] % heads or heads % keys:
        raise ValueError(
            f"--model {source}: {heads} heads with {keys} key heads do not divide a hidden_size of "
            f"{own['hidden_size']}; copy the config of the weights"
        )
    return LlamaConfig(**own, architectures=["LlamaForCausalLM"])


def _scaling(value: Any, source: str) -> dict[str, Any] | None:
    """Return transformers' spelling of ``rope_scaling``: {"type": "dynamic", "factor": 2.0} or None."""
    if value is None:
        return None
    kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else None
    factor = value.get("factor") if isinstance(value, dict) else None
    if kind not in _SCALINGS or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(
            f"--model {source}: rope_scaling {value!r} is none of InternLM2's: give "
            '{"type": "dynamic", "factor": 2.0}, or "linear", or null'
        )
    return {"rope_type": kind, "factor": float(factor)}


def layout_of(model: Any) -> dict[str, Stored]:
    """Return how InternLM2's tensors lie in the parameters of a Llama."""
    config = model.config
    parameters = dict(model.named_parameters())
    names: dict[str, str] = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
    }
    if "lm_head.weight" in parameters:
        names["output.weight"] = "lm_head.weight"
    layout: dict[str, Stored] = {}
    for index in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{index}.", f"model.layers.{index}."
        names |= {
            f"{theirs}attention_norm.weight": f"{ours}input_layernorm.weight",
            f"{theirs}ffn_norm.weight": f"{ours}post_attention_layernorm.weight",
            f"{theirs}feed_forward.w1.weight": f"{ours}mlp.gate_proj.weight",
            f"{theirs}feed_forward.w3.weight": f"{ours}mlp.up_proj.weight",
            f"{theirs}feed_forward.w2.weight": f"{ours}mlp.down_proj.weight",
        }
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            names[f"{theirs}attention.wo.{kind}"] = f"{ours}self_attn.o_proj.{kind}"
            layout[f"{theirs}attention.wqkv.{kind}"] = _fused(f"{ours}self_attn.{{}}_proj.{kind}", parameters, config)
    return layout | {theirs: whole(ours, parameters[ours]) for theirs, ours in names.items()}


def _fused(pattern: str, parameters: Mapping[str, Tensor], config: Any) -> Stored:
    """Return the layout of ``wqkv``: for each key head its query heads' rows, the key's, the value's."""
    keys, head = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    columns = parameters[pattern.format("q")].shape[1:]
    row = math.prod(columns)
    queries = config.num_attention_heads // keys
    runs: list[Run] = []
    for group in range(keys):
        for kind, heads in (("q", queries), ("k", 1), ("v", 1)):
            size = heads * head * row
            runs.append(Run(pattern.format(kind), group * size, size))
    return Stored((keys * (queries + 2) * head, *columns), tuple(runs))


@dataclass(frozen=True)
class Checkpoint:
    """The form of an InternLM2 checkpoint, to write a trained model in.

    Attributes:
        config: the fields of its config.json.
        files: its small files beside the weights, by name: configs, tokenizer, index.
        order: the names of the tensors in each file of weights, as they lie there.
        metadata: of each file of weights.
        dtype: of its tensors; None: of several.
    """

    config: dict[str, Any]
    files: dict[str, bytes]
    order: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    dtype: torch.dtype | None

    @staticmethod
    def of(shards: Shards, layout: Layout) -> Checkpoint:
        """Return it for an InternLM2 checkpoint."""
        folder, order = shards.folder, {name: list[str]() for name in shards.metadata}
        for name in sorted(layout, key=lambda name: shards.entries[name].start):
            order[shards.entries[name].file.name].append(name)
        small = [f for f in sorted(folder.iterdir()) if f.suffix in _SMALL and f.is_file()]
        files = {f.name: f.read_bytes() for f in small if f.stat().st_size <= _SMALL_BYTES}
        dtypes = {shards.entries[name].dtype for name in layout}
        dtype = next((dtype for dtype, name in DTYPE_NAMES.items() if dtypes == {name}), None)
        return Checkpoint(json.loads(files["config.json"]), files, order, shards.metadata, dtype)

    def save(
        self, model: Any, folder: Path, dtype: torch.dtype | None = None, values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a model as the checkpoint was, in the dtype of the model's parameters or another one.

        In the checkpoint's own dtype, a model that was not changed gives the same bytes in every file. Needs 16 MB.
        Values that are not the model's own are read by name, when they are written.
        """
        parameters: Mapping[str, Tensor] = values or dict(model.named_parameters(remove_duplicate=False))
        layout, dtype = layout_of(model), dtype or next(model.parameters()).dtype
        self.write(folder, layout, lambda name: write_tensor(layout[name], parameters), dtype)

    def write(
        self, folder: Path, layout: Layout, pieces: Callable[[str], Iterator[Tensor]], dtype: torch.dtype
    ) -> None:
        """Write a checkpoint whose tensors come in pieces.

        Args:
            folder: where to.
            layout: of its tensors.
            pieces: yields a stored tensor's values by its name.
            dtype: to store them in.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in self.order.items():
            tensors = [(name, layout[name].shape) for name in names]
            write_shard(folder / file, tensors, dtype, pieces, self.metadata[file])
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        if dtype != self.dtype:
            key = "dtype" if "dtype" in self.config else "torch_dtype"
            _write_json(folder / "config.json", self.config | {key: str(dtype).removeprefix("torch.")})
            if INDEX in self.files:
                index = json.loads(self.files[INDEX])
                size = sum(stored.numel for stored in layout.values()) * dtype.itemsize
                _write_json(folder / INDEX, index | {"metadata": {"total_size": size}})


_SMALL = (".json", ".model", ".txt", ".py", ".jinja", ".bytes")
_SMALL_BYTES = 64 << 20


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _needless(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name == "output.weight"


def load_internlm2(folder: Path, config: Any, *, later: bool) -> nn.Module:
    """Return an InternLM2 checkpoint as a Llama in fp32, whose attribute ``spu_checkpoint`` writes it back.

    Args:
        folder: of the checkpoint.
        config: as `internlm2_config` makes it.
        later: as for `spu.model.convert.decoder.load_decoder`.

    Raises:
        ValueError: the checkpoint is damaged, or not of this config; the text names the file and the fix.
    """
    shards, model = Shards(folder), empty_decoder(config)
    layout = layout_of(model)
    check(layout, shards, _needless)
    if later:
        defer(model, partial(fill, layout, shards))
    else:
        fill(layout, shards, materialise(model))
    model.spu_checkpoint = Checkpoint.of(shards, layout)
    return model.eval()
