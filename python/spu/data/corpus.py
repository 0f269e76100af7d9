"""Text as token ids, cut into training and validation parts, and batches that are a function of (seed, step)."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spu.data.text import clean_text, is_utf8
from spu.data.tokenizer import Tokenizer

__all__ = ["MAX_VALIDATION_TOKENS", "VALIDATION_SHARE", "Corpus", "make_corpus", "read_text", "tokenise"]

VALIDATION_SHARE = 0.05  # the end of the text
MAX_VALIDATION_TOKENS = 65_536  # more makes the figure steadier by less than a thousandth
_GOLDEN = 0x9E3779B97F4A7C15
_PIECE = 1 << 18  # bytes that are tokenised at once: a tokenizer takes 230 bytes of memory for each
_WINDOW = 256  # bytes on both sides of a cut that must give the same tokens together and apart
_CUT = re.compile(rb"(?<=\n)(?=\S)|(?<=\S)(?= \S)")  # between two lines, else two words
_REPORT_S = 5.0


def read_text(data: str | None) -> tuple[str, bytes]:
    """Return (name, contents) of a text file, or of Python's language reference, which every CPython ships.

    Raises:
        ValueError: missing, a folder, unreadable, empty, or what ``clean_text`` refuses.
    """
    if data is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)).encode()
    path = Path(data)
    if path.is_dir():
        raise ValueError(f"--data {data} is a folder: give one text file")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"--data {data}: no such file: give the path of a text file") from None
    except OSError as error:
        raise ValueError(f"--data {data} cannot be read ({error.strerror}): give a readable text file") from error
    if not text:
        raise ValueError(f"--data {data} is empty: give a text file with something to learn from")
    return str(path), clean_text(data, text)


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        name: where it came from.
        sha256: of the text, so that a resumed run is known to see the same.
        train: integer [tokens], in text order.
        validation: integer [tokens], the end of the text, never trained on.
    """

    name: str
    sha256: str
    train: torch.Tensor
    validation: torch.Tensor

    def batch(self, seed: int, step: int, batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets (the next tokens) of a step, int64 [batch, seq], from the arguments alone."""
        generator = torch.Generator().manual_seed((seed * _GOLDEN + step * 2 + 1) % 2**63)
        starts = torch.randint(len(self.train) - seq, (batch,), generator=generator)
        index = starts[:, None] + torch.arange(seq + 1)
        window = self.train[index].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def validation_batches(
        self, batch: int, seq: int, windows: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return inputs and targets int64 [up to batch, seq] of windows side by side over the validation part.

        Args:
            batch: sequences of a batch.
            seq: tokens of a sequence.
            windows: that many, spread evenly; None for all (up to ``MAX_VALIDATION_TOKENS`` tokens).
        """
        count = (len(self.validation) - 1) // seq
        wanted = min(count, max(1, MAX_VALIDATION_TOKENS // seq) if windows is None else windows)
        starts = torch.tensor([i * count // wanted * seq for i in range(wanted)])
        window = self.validation[starts[:, None] + torch.arange(seq + 1)].long()
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in window.split(batch)]


def make_corpus(data: str | None, tokenizer: Tokenizer, seq: int, say: Callable[[str], object] = print) -> Corpus:
    """Read, tokenise and split a text.

    Args:
        data: see ``read_text``.
        tokenizer: of the model.
        seq: tokens of a sequence.
        say: takes lines about the progress where it takes long.

    Raises:
        ValueError: see ``read_text``; or too short for one training and one validation sequence.
    """
    name, text = read_text(data)
    if not is_utf8(text):
        if tokenizer.name != "bytes":
            raise ValueError(f"--data {name} is not text in UTF-8, which {tokenizer.name} needs: give a text file")
        say(f"{name} is not text: it is trained on byte by byte")
    ids = tokenise(text, tokenizer, name, say)
    held_out = max(int(len(ids) * VALIDATION_SHARE), seq + 1)
    if len(ids) - held_out < seq + 1:
        raise ValueError(
            f"--data {name} has {len(ids)} tokens ({tokenizer.name}), and --seq {seq} needs at least {2 * (seq + 1)}: "
            f"one sequence to train on and one to validate; give more text or a smaller --seq"
        )
    cut = len(ids) - held_out
    return Corpus(name, hashlib.sha256(text).hexdigest(), ids[:cut], ids[cut:])


def tokenise(text: bytes, tokenizer: Tokenizer, name: str, say: Callable[[str], object] = print) -> torch.Tensor:
    """Return the token ids of a text, piece by piece where that gives the same ids, to bound memory and time."""
    if tokenizer.name == "bytes" or len(text) <= 2 * _PIECE:
        return tokenizer.encode(text)
    newline = tokenizer.encode(b"\n")

    def encode_next(piece: bytes) -> torch.Tensor:
        """Encode text that follows a line: many tokenizers put a space before the beginning of a text."""
        ids = tokenizer.encode(b"\n" + piece)
        return ids[len(newline) :] if torch.equal(ids[: len(newline)], newline) else tokenizer.encode(piece)

    def may_cut(at: int) -> bool:
        before, after = text[at - _WINDOW : at], text[at : at + _WINDOW]
        return torch.equal(tokenizer.encode(before + after), torch.cat((tokenizer.encode(before), encode_next(after))))

    pieces, start, shown = [], 0, time.monotonic()
    while start < len(text):
        places = (found.start() for found in _CUT.finditer(text, start + _PIECE))
        end = next((at for at, _ in zip(places, range(64)) if may_cut(at)), len(text))
        pieces.append(encode_next(text[start:end]) if start else tokenizer.encode(text[:end]))
        start = end
        if time.monotonic() - shown > _REPORT_S:
            shown = time.monotonic()
            say(f"tokenising {name}: {start / 1e6:.0f} of {len(text) / 1e6:.0f} MB")
    return torch.cat(pieces)
