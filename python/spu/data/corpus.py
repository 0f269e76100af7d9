"""What a run trains on: batches that are a function of (seed, step), and a part that is never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spu.data.documents import content_of, tokenised_documents
from spu.data.files import TEXT, DataFile, find_files
from spu.data.parts import MAX_VALIDATION_TOKENS, Batch, Part, Rows, Windows
from spu.data.store import Writer, kept_arrays
from spu.data.stream import Progress, token_stream
from spu.data.text import Text, default_text, open_text
from spu.data.tokenizer import Tokenizer

__all__ = ["MAX_VALIDATION_TOKENS", "VALIDATION_SHARE", "Corpus", "make_corpus"]

VALIDATION_SHARE = 0.05  # the end of a text, or documents from all over
_IN_MEMORY = 1 << 24  # bytes of text whose tokens are not worth a file


@dataclass(frozen=True)
class Corpus:
    """Data as tokens, cut into a part to train on and one to validate with.

    Attributes:
        name: where it came from.
        sha256: of the contents, so that a resumed run is known to see the same.
        train: what is trained on.
        validation: what never is.
        top: the largest token.
    """

    name: str
    sha256: str
    train: Part
    validation: Part
    top: int

    def batch(self, seed: int, step: int, batch: int, seq: int) -> Batch:
        """Return inputs and targets of a step, from the arguments alone.

        Returns:
            Inputs: token ids int64 [batch, seq], or where rows hold several documents a dict with "input_ids" and
            "position_ids", which begin again at 0 with each document. Targets: the next tokens, int64 [batch, seq],
            -100 where none is learnt.
        """
        return self.train.batch(seed, step, batch, seq)

    def steps_per_epoch(self, batch: int, seq: int) -> int:
        """Return the steps after which as much was seen as there is to train on."""
        return self.train.steps_per_epoch(batch, seq)

    def validation_batches(self, batch: int, seq: int, windows: int | None = None) -> list[Batch]:
        """Return inputs and targets, as ``batch`` does, [up to batch, seq] each, over the validation part in order.

        Args:
            batch: sequences of a batch.
            seq: tokens of a sequence.
            windows: that many, spread evenly; None for all (up to ``MAX_VALIDATION_TOKENS`` tokens).
        """
        return self.validation.in_order(batch, seq, windows)

    def question(self, tokens: int) -> torch.Tensor | None:
        """Return what comes before the first answer of a document of the validation part, if that is fewer than
        ``tokens`` tokens, int64; None where answers are not told from the rest.
        """
        return self.validation.question(tokens)

    def opening(self, tokens: int) -> torch.Tensor:
        """Return up to ``tokens`` tokens of the validation part, from its beginning, int64."""
        return self.validation.opening(tokens)


def make_corpus(
    data: str | Sequence[str] | None,
    tokenizer: Tokenizer,
    seq: int,
    say: Callable[[str], object] = print,
    *,
    val_data: str | Sequence[str] | None = None,
    pack: bool = True,
) -> Corpus:
    """Read, tokenise and split data.

    Text files alone are one text, of which windows are drawn; all else are documents, which are packed in rows.

    Args:
        data: files, patterns and folders (see ``find_files``), or None for the default text.
        tokenizer: of the model.
        seq: tokens of a sequence.
        say: takes lines about what is read, and about the progress where it takes long.
        val_data: the same for the validation part; None for a share of ``data``.
        pack: put several documents in a row, else one.

    Raises:
        ValueError: files that cannot be used; or too little for one training and one validation sequence.
    """
    files = None if data is None else find_files(_listed(data))
    made = _part(files, tokenizer, say, pack)
    if val_data is None:
        train, validation = made.part.split(VALIDATION_SHARE, seq, f"--data {made.name}", tokenizer.name)
        return Corpus(made.name, made.sha256, train, validation, made.top)
    held_out = find_files(_listed(val_data), "--val-data")
    trained = {Path(file.path).resolve() for file in files or ()}
    if both := [file.path for file in held_out if Path(file.path).resolve() in trained]:
        say(f"--val-data {both[0]} is trained on as well (--data): the validation loss tells nothing of other text")
    other = _part(held_out, tokenizer, say, pack)
    made.part.check(seq, f"--data {made.name}", tokenizer.name)
    other.part.check(seq, f"--val-data {other.name}", tokenizer.name)
    joined = hashlib.sha256(f"{made.sha256} {other.sha256}".encode()).hexdigest()
    return Corpus(made.name, joined, made.part, other.part, max(made.top, other.top))


@dataclass(frozen=True)
class _Made:
    """A part, before anything of it is held out."""

    name: str
    sha256: str
    part: Part
    top: int


def _listed(data: str | Sequence[str]) -> list[str]:
    return [data] if isinstance(data, str) else list(data)


def _part(files: list[DataFile] | None, tokenizer: Tokenizer, say: Callable[[str], object], pack: bool) -> _Made:
    if files is None or all(file.kind == TEXT for file in files):
        return _text_part(files, tokenizer, say)
    name = files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
    content = content_of(files)
    arrays = tokenised_documents(files, content, tokenizer, say)
    key = {"content": content, "tokenizer": tokenizer.fingerprint}
    part = Rows(arrays["tokens"], arrays["ends"], arrays.get("trained"), None, pack, key)
    return _Made(name, content, part, arrays.meta["top"])


def _text_part(files: list[DataFile] | None, tokenizer: Tokenizer, say: Callable[[str], object]) -> _Made:
    label = files[0].label if files else "--data"
    texts = [default_text()] if files is None else [open_text(file.path, label) for file in files]
    for text in texts:
        if not text.utf8:
            if tokenizer.name != "bytes":
                raise ValueError(f"{label} {text.name} is not text in UTF-8, which {tokenizer.name} needs: give text")
            say(f"{text.name} is not text: it is trained on byte by byte")
    hashes = [text.sha256 for text in texts]
    name = texts[0].name if len(texts) == 1 else f"{texts[0].name} and {len(texts) - 1} more"
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    if sum(text.size for text in texts) <= _IN_MEMORY:
        parts = [ids for text in texts for ids in _tokens_of(text, tokenizer, say)]
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device="cpu")
        return _Made(name, sha256, Windows(ids), int(ids.max()) if len(ids) else 0)

    def make(writer: Writer) -> Mapping[str, Any]:
        top = 0
        for text in texts:
            for ids in _tokens_of(text, tokenizer, say):
                writer.append("tokens", ids.numpy(), tokenizer.dtype if tokenizer.name == "bytes" else np.int32)
                top = max(top, int(ids.max()))
        return {"top": top}

    arrays = kept_arrays({"text": sha256, "tokenizer": tokenizer.fingerprint}, make)
    return _Made(name, sha256, Windows(torch.from_numpy(arrays["tokens"])), arrays.meta["top"])


def _tokens_of(text: Text, tokenizer: Tokenizer, say: Callable[[str], object]) -> Iterator[torch.Tensor]:
    progress = Progress(text.name, text.size, say)

    def seen() -> Iterator[bytes]:
        for piece in text.pieces():
            yield piece
            progress.add(len(piece))

    return token_stream(seen(), tokenizer)
