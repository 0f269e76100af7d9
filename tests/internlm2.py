"""InternLM2 in plain torch, written from its checkpoints' own code: what the conversion is held to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "model_type": "internlm2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 300,
}


def make_weights(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random tensors under InternLM2's names."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rows = (heads + 2 * config["num_key_value_heads"]) * hidden // heads
    shapes = {"model.tok_embeddings.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["output.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        shapes |= {f"{name}.attention.wqkv.weight": (rows, hidden), f"{name}.attention.wo.weight": (hidden, hidden)}
        if config["bias"]:
            shapes |= {f"{name}.attention.wqkv.bias": (rows,), f"{name}.attention.wo.bias": (hidden,)}
        shapes |= {f"{name}.feed_forward.{w}.weight": (inner, hidden) for w in ("w1", "w3")}
        shapes[f"{name}.feed_forward.w2.weight"] = (hidden, inner)
        shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in ("attention_norm", "ffn_norm")}
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(folder: Path, config: dict[str, Any] = CONFIG, *, shards: int = 2) -> dict[str, Tensor]:
    """Write a checkpoint as they are published: shards, an index, code of its own that nobody runs."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "configuration_internlm2.py").write_text("raise SystemExit('remote code has been run')\n")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return weights
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    places = {name: files[n * shards // len(weights)] for n, name in enumerate(weights)}
    for file in files:
        save_file({n: t for n, t in weights.items() if places[n] == file}, folder / file, {"format": "pt"})
    size = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return weights


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, positions: Tensor, config: dict[str, Any]) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, head]: halves, with the base that the length asks for."""
    head, base, length = x.shape[-1], float(config["rope_theta"]), int(positions.max()) + 1
    scaling, most = config["rope_scaling"], config["max_position_embeddings"]
    if scaling is not None and length > most:
        factor = scaling["factor"]
        base *= (factor * length / most - (factor - 1)) ** (head / (head - 2))
    frequencies = 1.0 / base ** (torch.arange(0, head, 2).double() / head)
    angles = (positions[:, None, :, None].double() * frequencies).to(x.dtype)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def forward(weights: dict[str, Tensor], ids: Tensor, config: dict[str, Any]) -> Tensor:
    """Logits [batch, tokens, vocabulary]."""
    heads, keys, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    head, group = config["hidden_size"] // heads, heads // keys
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    x = F.embedding(ids, weights["model.tok_embeddings.weight"], padding_idx=config["pad_token_id"])
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for index in range(config["num_hidden_layers"]):
        w = {n.removeprefix(f"model.layers.{index}."): t for n, t in weights.items() if f"layers.{index}." in n}
        y = norm(x, w["attention_norm.weight"], eps)
        qkv = F.linear(y, w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
        qkv = qkv.view(*ids.shape, keys, group + 2, head)
        q = rotate(qkv[..., :group, :].flatten(2, 3).transpose(1, 2), positions, config)
        k = rotate(qkv[..., group, :].transpose(1, 2), positions, config).repeat_interleave(group, 1)
        v = qkv[..., group + 1, :].transpose(1, 2).repeat_interleave(group, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(head)).masked_fill(~causal, -math.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, w["attention.wo.weight"], w.get("attention.wo.bias"))
        y = norm(x, w["ffn_norm.weight"], eps)
        gate, up = F.linear(y, w["feed_forward.w1.weight"]), F.linear(y, w["feed_forward.w3.weight"])
        x = x + F.linear(F.silu(gate) * up, w["feed_forward.w2.weight"])
    return F.linear(norm(x, weights["model.norm.weight"], eps), weights["output.weight"])
