"""Files of documents as tokens in files: each document's tokens, and which of them are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spu.data.delimited import csv_rows
from spu.data.example import Example, Tokens
from spu.data.files import CSV, DATASET, JSONL, PARQUET, DataFile
from spu.data.jsonl import jsonl_rows
from spu.data.rows import Row, examples_of
from spu.data.store import Arrays, Writer, kept_arrays
from spu.data.stream import PIECE, Progress, in_threads, token_stream
from spu.data.tables import dataset_rows, parquet_rows
from spu.data.text import open_text
from spu.data.tokenizer import Tokenizer

__all__ = ["content_of", "tokenised_documents"]

_BLOCK = 1 << 20  # bytes, or tokens, at once
_MOST_EXAMPLES = 512  # that are tokenised at once


def content_of(files: Sequence[DataFile]) -> str:
    """Return a hash of what is in the files, in order, whatever they are called.

    Raises:
        ValueError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        parts = sorted(p for p in Path(file.path).rglob("*") if p.is_file()) if file.kind == DATASET else [file.path]
        for part in parts:
            try:
                with open(part, "rb") as stream:
                    one = hashlib.sha256()
                    while block := stream.read(_BLOCK):
                        one.update(block)
            except FileNotFoundError:
                raise ValueError(f"{file.label} {part}: no such file: give the path of a file") from None
            except OSError as error:
                raise ValueError(f"{file.label} {part} cannot be read ({error.strerror})") from error
            digest.update(f"{file.kind} {one.hexdigest()} ".encode())
    return digest.hexdigest()


def tokenised_documents(
    files: Sequence[DataFile], content: str, tokenizer: Tokenizer, say: Callable[[str], object]
) -> Arrays:
    """Return the documents of files as tokens, from the cache where they are there.

    Args:
        files: to read, in order.
        content: ``content_of`` them.
        tokenizer: of the model.
        say: takes lines about what is read, and about the progress where it takes long.

    Returns:
        "tokens" [tokens]; "ends" int64 [documents], where each document's tokens end; "trained" uint8 [tokens], if not
        all are; ``meta["top"]``, the largest token.

    Raises:
        ValueError: what the readers refuse; a document without anything to learn; names the file and the line.
    """
    made_from = {"documents": content, "tokenizer": tokenizer.fingerprint}

    def make(writer: Writer) -> Mapping[str, Any]:
        sink = _Sink(writer, tokenizer)
        for file in files:
            _add(file, sink, tokenizer, say)
        return sink.finish()

    return kept_arrays(made_from, make)


def _add(file: DataFile, sink: _Sink, tokenizer: Tokenizer, say: Callable[[str], object]) -> None:
    progress = Progress(file.path, 0 if file.kind == DATASET else Path(file.path).stat().st_size, say)
    before = sink.documents

    def encoded(examples: list[Example]) -> list[tuple[Example, Tokens]]:
        if len(examples) == 1 and examples[0].spans is None and len(examples[0].text) > PIECE:
            return [(examples[0], _in_parts(examples[0], tokenizer))]
        return list(zip(examples, tokenizer.encode_examples(examples), strict=True))

    if file.kind == "text":
        _add_text(file, sink, tokenizer, progress)
        return
    for done in in_threads(encoded, _batches(_examples(file, tokenizer, say, progress))):
        for example, tokens in done:
            if not tokens.targets:
                raise ValueError(f"{example.where}: no token of it is trained, so there is nothing to learn: remove it")
            sink.add(tokens.ids, tokens.trained)
            sink.end()
        if file.kind != JSONL:
            progress.add(sum(len(example.text) for example, _ in done))
    if sink.documents == before:
        raise ValueError(f"{file.label} {file.path} is empty: give a file with something to learn from")


def _add_text(file: DataFile, sink: _Sink, tokenizer: Tokenizer, progress: Progress) -> None:
    """Add a text file as one document, part by part."""
    text = open_text(file.path, file.label)
    if not text.utf8:
        raise ValueError(f"{file.label} {file.path} is not text in UTF-8: give text, or give it alone")
    before, after = (np.array(ends, dtype=np.int32) for ends in tokenizer.ends)
    count = sink.add(before)
    for ids in token_stream(_counted(text.pieces(), progress), tokenizer):
        count += sink.add(ids.numpy())
    if count + sink.add(after) < 2:
        raise ValueError(f"{file.label} {file.path} has one token, so there is nothing to learn: give more text")
    sink.end()


def _counted(pieces: Iterator[bytes], progress: Progress) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        progress.add(len(piece))


def _in_parts(example: Example, tokenizer: Tokenizer) -> Tokens:
    """Tokenise a long text part by part."""
    before, after = (np.array(ends, dtype=np.int32) for ends in tokenizer.ends)
    parts = [ids.numpy() for ids in token_stream([example.text.encode()], tokenizer)]
    return Tokens(np.concatenate([before, *parts, after]))


def _examples(
    file: DataFile, tokenizer: Tokenizer, say: Callable[[str], object], progress: Progress
) -> Iterator[Example]:
    rows: Iterator[Row]
    if file.kind == PARQUET:
        rows = parquet_rows(file.path, file.label)
    elif file.kind == DATASET:
        rows = dataset_rows(file.path, file.label)
    elif file.kind == CSV:
        rows = csv_rows(file.path, file.label)
    else:
        rows = jsonl_rows(file.path, file.label, progress.add)
    for example in examples_of(rows, tokenizer, file.path, say):
        try:
            example.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{example.where}: its character {error.start} is half of a surrogate pair, which is no text: write "
                "the character whole"
            ) from None
        yield example


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Yield examples in lists of about ``PIECE`` characters; a longer one is alone."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        if batch and len(example.text) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += len(example.text)
        if size >= PIECE or len(batch) >= _MOST_EXAMPLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Sink:
    """Writes documents; ``trained`` only from the first document on that is not trained as a whole."""

    def __init__(self, writer: Writer, tokenizer: Tokenizer) -> None:
        self._writer, self._dtype = writer, tokenizer.dtype
        self._tokens, self._top, self._masked = 0, 0, False
        self.documents = 0

    def add(self, ids: np.ndarray[Any, Any], trained: np.ndarray[Any, Any] | None = None) -> int:
        """Append tokens to a document; return how many."""
        count = len(ids)
        if trained is not None and not self._masked:
            self._masked = True
            for start in range(0, self._tokens, _BLOCK):
                self._append_trained(np.ones(min(_BLOCK, self._tokens - start), dtype=np.uint8))
        if self._masked:
            self._append_trained(np.ones(count, np.uint8) if trained is None else trained)
        self._writer.append("tokens", ids, self._dtype)
        self._tokens += count
        self._top = max(self._top, int(ids.max()) if count else 0)
        return count

    def end(self) -> None:
        """End a document."""
        self._writer.append("ends", np.array([self._tokens]), np.int64)
        self.documents += 1

    def _append_trained(self, values: np.ndarray[Any, Any]) -> None:
        self._writer.append("trained", values, np.uint8)

    def finish(self) -> dict[str, Any]:
        """Return what is to be known of the documents."""
        return {"top": self._top, "documents": self.documents}
