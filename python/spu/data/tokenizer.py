"""Tokenizers: text to token ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from spu.common.errors import first_line
from spu.data.internlm2 import internlm2_tokenizer, is_internlm2

__all__ = ["BYTE_VOCABULARY", "ByteTokenizer", "FileTokenizer", "Tokenizer", "make_tokenizer"]

BYTE_VOCABULARY = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_BYTES_FILE = "tokenizer.bytes"  # beside weights that were trained on bytes


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str

    def encode(self, text: bytes) -> torch.Tensor: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """Every byte is a token."""

    name = "bytes"

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the bytes as uint8 [bytes]."""
        return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < BYTE_VOCABULARY).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Note beside a model that its tokens are bytes."""
        (folder / _BYTES_FILE).write_text("Every byte is a token.\n", encoding="utf-8")


class FileTokenizer:
    """The tokenizer whose files lie beside a model's weights."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.name = f"tokenizer of {folder}"
        if is_internlm2(folder):
            self._tokenizer = internlm2_tokenizer(folder)
            return
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

    @property
    def inner(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the tokens of UTF-8 text as int32 [tokens]."""
        ids = self._tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files beside a model."""
        self._tokenizer.save_pretrained(folder)


def make_tokenizer(source: str | None, vocabulary: int, *, weights: bool) -> Tokenizer:
    """Return the tokenizer beside a model's files, else bytes: for a config alone, or weights that were trained on
    bytes.

    Args:
        source: folder of the model, a config, or None for the default model.
        vocabulary: of the model, in tokens.
        weights: whether there are trained ones at ``source``.

    Raises:
        ValueError: weights that were not, without a tokenizer; bytes do not fit the model's vocabulary; or the
            tokenizer's files cannot be read.
    """
    folder = Path(source) if source else None
    if folder and folder.is_dir() and any((folder / name).exists() for name in _TOKENIZER_FILES):
        try:
            return FileTokenizer(folder)
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            raise ValueError(f"--model {source}: its tokenizer cannot be read: {first_line(error)}") from error
    on_bytes = vocabulary == BYTE_VOCABULARY or (folder is not None and (folder / _BYTES_FILE).exists())
    if weights and not on_bytes:
        raise ValueError(
            f"--model {source}: weights for {vocabulary} tokens, and no tokenizer beside them: put its tokenizer.json "
            f"there, or an empty file {_BYTES_FILE} if they are to be trained on bytes"
        )
    if vocabulary < BYTE_VOCABULARY:
        raise ValueError(
            f"--model {source}: a vocabulary of {vocabulary} cannot hold bytes: give vocab_size {BYTE_VOCABULARY} or "
            "more, or a tokenizer beside the config"
        )
    return ByteTokenizer()
