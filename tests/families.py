"""Tiny decoders of every family that the tests know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()  # its bars start a monitor thread that never ends

VOCABULARY = 64

PLANNED = ("InternLM3", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Phi3", "Granite")
PLANNED += ("Cohere", "Olmo2", "SmolLM3")
# By their structure: positions, dropouts, norms or projections beside the layers, layers that return tuples, experts.
BUILT = ("GPT2", "OPT", "GPTNeoX", "Bloom", "Falcon", "StableLm", "Mixtral", "Qwen3Moe", "NanoChat")
# Layers that carry a state along the sequence (Mamba's, linear attention), beside others or in them; two layers each.
RECURRENT = ("Bamba", "FalconH1", "GraniteMoeHybrid", "Lfm2", "Mamba2", "NemotronH", "Qwen3Next")
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}

# What a family's config calls otherwise, or has beside; dropouts are off, since each layer draws from its own seed.
SPECIAL: dict[str, dict[str, Any]] = {
    "InternLM3": {"head_dim": 8},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "Granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "GPT2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "OPT": {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 24, "pad_token_id": 1},
    "Falcon": {"alibi": True, "ffn_hidden_size": 48},
    "StableLm": {"use_parallel_residual": True},
    "GPTNeoX": {"use_parallel_residual": True},
    "Mixtral": {"num_local_experts": 4},
    "Llama4Text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attn_temperature_tuning": False,
    },
    "Bamba": {"attn_layer_indices": [1], **_MAMBA},
    "FalconH1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, **_MAMBA},
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        **_MAMBA,
    },
    "Lfm2": {"full_attn_idxs": [1]},
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "NemotronH": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def make_decoder(family: str, **overrides: Any) -> Any:
    """A model in training mode with seeded weights; skips where this transformers does not have the family."""
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}Config")
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    options.update(SPECIAL.get(family, {}))
    options.update(overrides)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**options))
    return model.train()
