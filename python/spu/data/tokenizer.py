"""Tokenizers: text to token ids and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from spu.common.errors import first_line
from spu.data.example import Example, Tokens
from spu.data.internlm2 import internlm2_tokenizer, is_internlm2

__all__ = ["BYTE_VOCABULARY", "ByteTokenizer", "FileTokenizer", "Tokenizer", "make_tokenizer"]

BYTE_VOCABULARY = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_READ_AS_WELL = ("merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_BYTES_FILE = "tokenizer.bytes"  # beside weights that were trained on bytes


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: for messages; "bytes" for bytes.
        dtype: the narrowest integers that hold its tokens in a file.
        fingerprint: another one for a tokenizer that gives other tokens.
        ends: the tokens that begin and end a document.
        end_text: how the token that ends one is written; None if there is none.
    """

    name: str

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def ends(self) -> tuple[list[int], list[int]]: ...

    @property
    def end_text(self) -> str | None: ...

    def encode(self, text: bytes) -> torch.Tensor: ...

    def encode_examples(self, examples: Sequence[Example]) -> list[Tokens]: ...

    def render(self, chats: list[list[dict[str, Any]]], *, ask: bool) -> list[str]: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """Every byte is a token. There is none to begin or to end a text with."""

    name = "bytes"
    fingerprint = "bytes"
    end_text = None
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """None: every byte is text."""
        return [], []

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the bytes as uint8 [bytes]."""
        if not text:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def encode_examples(self, examples: Sequence[Example]) -> list[Tokens]:
        """Return the bytes of each example, and which of them are trained."""
        result = []
        for example in examples:
            ids = np.frombuffer(example.text.encode(), dtype=np.uint8)
            trained = None
            if example.spans is not None:
                trained = np.zeros(len(ids), dtype=bool)
                for begin, end in example.spans:
                    first = len(example.text[:begin].encode())
                    trained[first : first + len(example.text[begin:end].encode())] = True
            result.append(Tokens(ids, trained))
        return result

    def render(self, chats: list[list[dict[str, Any]]], *, ask: bool) -> list[str]:
        """Raise ValueError: bytes have no chat template."""
        raise ValueError(
            "a chat needs a tokenizer with a chat template, and the model's tokens are bytes: give --model a folder "
            "with a tokenizer, or data with the columns prompt and response"
        )

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
        self._folder = folder
        if is_internlm2(folder):
            self._tokenizer = internlm2_tokenizer(folder)
            return
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

    @property
    def inner(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Two bytes a token, or four for a vocabulary that needs them."""
        return np.dtype(np.uint16 if len(self._tokenizer) <= 1 << 16 else np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Of its files, and of the packages that read them."""
        import tokenizers
        import transformers

        digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
        for name in (*_TOKENIZER_FILES, *_READ_AS_WELL):
            file = self._folder / name
            if file.exists():
                digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def _fast(self) -> Any:
        """The tokenizer of the package ``tokenizers`` within, without the truncation and padding that its file may ask
        for; None for a slow one.
        """
        import tokenizers

        inner = getattr(self._tokenizer, "backend_tokenizer", None)
        if inner is None:
            return None
        inner = tokenizers.Tokenizer.from_str(inner.to_str())
        inner.no_truncation()
        inner.no_padding()
        return inner

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The tokens that begin and end a text: as the tokenizer begins one, and its end-of-text token."""
        first, last = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        given = self._tokenizer("a")["input_ids"]
        return [first] if first is not None and given[:1] == [first] else [], [] if last is None else [last]

    @property
    def end_text(self) -> str | None:
        """The end-of-text token's own text."""
        return self._tokenizer.eos_token  # type: ignore[no-any-return]

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the tokens of UTF-8 text as int32 [tokens]."""
        return torch.from_numpy(self._ids(text.decode("utf-8", errors="replace")))

    def encode_examples(self, examples: Sequence[Example]) -> list[Tokens]:
        """Return the tokens of each example, and which of them are trained: those within its spans.

        Where a token would lie on both sides of a span's end, the two sides are tokenised by themselves: a prompt is
        when it is answered.
        """
        if self._fast is None:
            return [self._closed(example, *self._by_prefixes(example)) for example in examples]
        texts, parted = [example.text for example in examples], any(example.spans is not None for example in examples)
        encode = self._fast.encode_batch if parted else self._fast.encode_batch_fast  # which has no offsets
        result = []
        for example, one in zip(examples, encode(texts, add_special_tokens=False), strict=True):
            ids, trained = np.array(one.ids, dtype=np.int32), None
            if example.spans is not None:
                begins, ends = np.array(one.offsets, dtype=np.int64).reshape(-1, 2).T
                trained = np.zeros(len(ids), dtype=bool)
                for begin, end in example.spans:
                    trained |= (begins >= begin) & (ends <= end)
                places = np.array(example.spans).reshape(-1, 1)
                if ((begins < places) & (ends > places)).any():
                    ids, trained = self._by_spans(example)
            result.append(self._closed(example, ids, trained))
        return result

    def _by_prefixes(self, example: Example) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Tokenise without offsets: what lies before each end of a span must be how the whole text's tokens begin."""
        ids = self._ids(example.text)
        if example.spans is None:
            return ids, None
        trained = np.zeros(len(ids), dtype=bool)
        for span in example.spans:
            before = [self._ids(example.text[:place]) for place in span]
            if any(not np.array_equal(part, ids[: len(part)]) for part in before):
                return self._by_spans(example)
            trained[len(before[0]) : len(before[1])] = True
        return ids, trained

    def _by_spans(self, example: Example) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Tokenise what is trained and what is not by itself."""
        assert example.spans is not None
        newline = self._ids("\n")
        parts, trained, at = [], [], 0
        for place, learnt in [*((p, k == 1) for span in example.spans for k, p in enumerate(span)), (None, False)]:
            text = example.text[at:place]
            ids = self._ids("\n" + text) if at else self._ids(text)
            if at:  # many tokenizers put a space before the beginning of a text
                ids = ids[len(newline) :] if np.array_equal(ids[: len(newline)], newline) else self._ids(text)
            parts.append(ids)
            trained.append(np.full(len(ids), learnt))
            at = len(example.text) if place is None else place
        return np.concatenate(parts), np.concatenate(trained)

    def _ids(self, text: str) -> np.ndarray[Any, Any]:
        if self._fast is not None:  # unlike `encode`, this one lets other threads work
            return np.array(self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def _closed(self, example: Example, ids: np.ndarray[Any, Any], trained: np.ndarray[Any, Any] | None) -> Tokens:
        """Return the tokens between those that begin and end a text, where the example has none of its own."""
        if not example.closed:
            return Tokens(ids, trained)
        before, after = self.ends
        if trained is not None:
            trained = np.concatenate((np.zeros(len(before), bool), trained, np.ones(len(after), bool)))
        return Tokens(np.array([*before, *ids.tolist(), *after], dtype=np.int32), trained)

    def render(self, chats: list[list[dict[str, Any]]], *, ask: bool) -> list[str]:
        """Return conversations as the chat template writes them.

        Args:
            chats: the messages of each.
            ask: whether the beginning of the assistant's answer follows.

        Raises:
            ValueError: there is no template.
            jinja2.TemplateError: the template refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"a chat needs a chat template, and {self.name} has none: put its chat_template.jinja there, or give "
                "data with the columns prompt and response"
            )
        return list(self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=ask))

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
