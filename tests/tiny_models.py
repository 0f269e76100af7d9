"""Folders with tiny models and tokenizers, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
"""The config of a Llama whose tokens are bytes."""
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
"""What the configs of small decoders have in common."""
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tokenizer_folder(folder: Path, *, template: str | None = CHATML, kind: str = "byte-level", text: str = "") -> Path:
    """Write a tokenizer of about 300 tokens, as GPT-2's and Qwen's ("byte-level") or Llama 2's ("sentencepiece")."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = text or "the quick brown fox jumps over the lazy dog. How are you today? I am fine, thank you."
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=[*SPECIAL, "<unk>", *byte_tokens], show_progress=False
        )
    tokenizer.train_from_iterator(words.splitlines(), trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def model_folder(folder: Path, **changes: Any) -> Path:
    """Write a tokenizer and the config of a Llama of 10,000 parameters beside it."""
    tokenizer_folder(folder)
    (folder / "config.json").write_text(json.dumps({**TINY, "vocab_size": 320, **changes}))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON Lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """Return a row of messages; the user begins."""
    messages = [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}
