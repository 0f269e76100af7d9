"""A decoder of some thousand parameters, and a tokenizer of whole words with a chat template."""

from __future__ import annotations

from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{{ {'system': '<sys> ', 'user': '<user> ', 'assistant': '<bot> '}[m.role] + m.content }}"
    "{{ ' <end> ' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
WORDS = [
    "<unk>", "<end>", "<sys>", "<user>", "<bot>", ".", "be", "kind", "hello", "how", "are", "you", "the", "cat", "sat",
]  # fmt: skip


def chat_tokenizer() -> Any:
    """Words between spaces; `<end>` ends a turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sys>", "<user>", "<bot>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(vocabulary: int, *, tied: bool = False, positions: int = 64, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=positions, tie_word_embeddings=tied, bos_token_id=None,
            eos_token_id=None, initializer_range=0.5,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
