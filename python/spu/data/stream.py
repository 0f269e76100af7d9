"""Text as tokens in one pass, with little of it in memory, on all cores."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from spu.data.tokenizer import Tokenizer

__all__ = ["PIECE", "Progress", "in_threads", "token_stream"]

PIECE = 1 << 17  # bytes that are tokenised at once: a tokenizer takes 230 bytes of memory for each
_WINDOW = 256  # bytes on both sides of a cut that must give the same tokens together and apart
_CUT = re.compile(rb"(?<=\n)(?=\S)|(?<=\S)(?= \S)")  # between two lines, else two words
_TRIES = 64  # places that are tried before more text is read
_REPORT_S = 5.0
_THREADS = 8  # more would take more memory than the rest of the job

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress:
    """Says how far it is, where it takes long.

    Args:
        name: of what is tokenised.
        total: bytes of it; 0 if that is not known.
        say: takes the lines.
    """

    def __init__(self, name: str, total: int, say: Callable[[str], object]) -> None:
        self._name, self._total, self._say = name, total, say
        self._done, self._shown = 0, time.monotonic()

    def add(self, size: int) -> None:
        """Count ``size`` bytes as done."""
        self._done += size
        if time.monotonic() - self._shown > _REPORT_S:
            self._shown = time.monotonic()
            of = f" of {self._total / 1e6:.0f}" if self._total else ""
            self._say(f"tokenising {self._name}: {self._done / 1e6:.0f}{of} MB")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``function`` of each item, in order, a few of them at once: tokenizers leave Python while they work."""
    threads = min(_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def token_stream(pieces: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Yield the token ids of a text, part by part where that gives the same ids, to bound memory and time.

    Args:
        pieces: of the text, of any length; UTF-8, unless the tokens are bytes.
        tokenizer: of the model.

    Yields:
        Integers [tokens].
    """
    if tokenizer.name == "bytes":
        yield from map(tokenizer.encode, pieces)
        return
    newline = tokenizer.encode(b"\n")

    def encode_next(piece: bytes) -> torch.Tensor:
        """Encode text that follows a line: many tokenizers put a space before the beginning of a text."""
        ids = tokenizer.encode(b"\n" + piece)
        return ids[len(newline) :] if torch.equal(ids[: len(newline)], newline) else tokenizer.encode(piece)

    def may_cut(text: bytes, at: int) -> bool:
        before, after = text[at - _WINDOW : at], text[at : at + _WINDOW]
        return torch.equal(tokenizer.encode(before + after), torch.cat((tokenizer.encode(before), encode_next(after))))

    def parts() -> Iterator[tuple[bytes, bool]]:
        text, tried, first = b"", PIECE, True
        for piece in pieces:
            text += piece
            while len(text) >= tried + PIECE:
                places = [found.start() for found, _ in zip(_CUT.finditer(text, tried), range(_TRIES))]
                end = next((at for at in places if at + _WINDOW <= len(text) and may_cut(text, at)), None)
                if end is None:  # a long word, say
                    tried = max(tried + 1, places[-1] + 1) if len(places) == _TRIES else len(text)
                    continue
                yield text[:end], first
                text, tried, first = text[end:], PIECE, False
        if text:
            yield text, first

    yield from in_threads(lambda part: tokenizer.encode(part[0]) if part[1] else encode_next(part[0]), parts())
