"""Sentencepiece models (`tokenizer.model`, byte-pair encoding) as fast tokenizers, without the package that made them.

A model is a protocol buffer (`sentencepiece_model.proto`): field 1, once for each token, has its text (1), score (2)
and kind (3); field 2 says how it was trained (3: the algorithm); field 3 how text is normalised before. Byte-pair
encoding joins the neighbours whose joint token has the highest score, so merges are ordered by that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CONTROL", "Piece", "SentencePieces", "fast_tokenizer", "read_sentencepieces"]

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds of tokens; 1: normal, 5: unused
_BPE = 2
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space


@dataclass(frozen=True)
class Piece:
    """A token: its text, score and kind."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieces:
    """What a model says.

    Attributes:
        pieces: the tokens by their ids.
        charsmap: precompiled normalisation of characters; empty: none.
        dummy_prefix: a text gets a space in front.
        strip: spaces at both ends, and repeated ones, are dropped.
    """

    pieces: list[Piece]
    charsmap: bytes
    dummy_prefix: bool
    strip: bool


def read_sentencepieces(file: Path) -> SentencePieces:
    """Read a sentencepiece model.

    Raises:
        ValueError: it is damaged, or no byte-pair encoding.
    """
    try:
        message = _by_number(file.read_bytes())
        pieces = [_piece(data) for data in message.get(1, [])]
        trainer = _by_number(message.get(2, [b""])[-1])
        normaliser = _by_number(message.get(3, [b""])[-1])
    except (ValueError, IndexError, struct.error, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged or no sentencepiece model; copy it again") from error
    if not pieces:
        raise ValueError(f"{file} is no sentencepiece model: it has no tokens; copy it again")
    if trainer.get(3, [1])[-1] != _BPE:
        raise ValueError(f"{file} is no byte-pair encoding: put a tokenizer.json beside it")
    charsmap = normaliser.get(2, [b""])[-1]
    return SentencePieces(pieces, charsmap, bool(normaliser.get(3, [1])[-1]), bool(normaliser.get(4, [1])[-1]))


def _piece(data: bytes) -> Piece:
    fields = _by_number(data)
    score = struct.unpack("<f", fields[2][-1])[0] if 2 in fields else 0.0
    return Piece(fields[1][-1].decode(), score, fields.get(3, [1])[-1])


def _by_number(data: bytes) -> dict[int, list[Any]]:
    """Return the fields of a message: whole numbers for varints, bytes for all else."""
    found: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(kind)
        if at + size > len(data):
            raise ValueError("cut")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fast_tokenizer(model: SentencePieces, renamed: Mapping[int, str]) -> Any:
    """Return a `tokenizers.Tokenizer` that gives a sentencepiece model's ids.

    Args:
        model: of byte-pair encoding.
        renamed: ids whose tokens have other texts than in the model: marks in reserved places, matched whole.

    Raises:
        ImportError: no package `tokenizers`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    texts = [renamed.get(number, piece.text) for number, piece in enumerate(model.pieces)]
    ids = {text: number for number, text in enumerate(texts)}
    unknown = next((texts[n] for n, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    fallback = any(piece.kind == BYTE for piece in model.pieces)
    bpe = models.BPE(ids, _merges(model, renamed), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strip:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(content=" ", left=1)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends
    ])  # fmt: skip
    for number, piece in enumerate(model.pieces):
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED) or number in renamed:
            special = piece.kind != USER_DEFINED or number in renamed
            tokenizer.add_tokens([AddedToken(texts[number], normalized=False, special=special)])
    return tokenizer


def _merges(model: SentencePieces, renamed: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, those with the highest score of the joint one first."""
    joined = {
        piece.text: (piece.score, number)
        for number, piece in enumerate(model.pieces)
        if piece.kind == 1 and number not in renamed
    }
    found = []
    for text, (score, _) in joined.items():
        for middle in range(1, len(text)):
            left, right = joined.get(text[:middle]), joined.get(text[middle:])
            if left is not None and right is not None:
                found.append((-score, left[1], right[1], text[:middle], text[middle:]))
    return [(left, right) for *_, left, right in sorted(found)]
