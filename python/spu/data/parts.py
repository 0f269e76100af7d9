"""A part of a corpus: windows of a text, or rows of documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from spu.data.order import shuffled
from spu.data.packing import packed_rows
from spu.data.store import Arrays, Writer, kept_arrays

__all__ = ["MAX_VALIDATION_TOKENS", "Batch", "Part", "Rows", "Windows"]

MAX_VALIDATION_TOKENS = 65_536  # more makes the figure steadier by less than a thousandth
IGNORED = -100  # the target of a position from which nothing is learnt
_SOME = 100  # documents among which a short question is looked for
_GOLDEN = 0x9E3779B97F4A7C15

Batch = tuple[torch.Tensor | dict[str, torch.Tensor], torch.Tensor]


class Part(Protocol):
    """What ``Corpus`` asks of its parts; see there."""

    def batch(self, seed: int, step: int, batch: int, seq: int) -> Batch: ...

    def steps_per_epoch(self, batch: int, seq: int) -> int: ...

    def in_order(self, batch: int, seq: int, windows: int | None) -> list[Batch]: ...

    def question(self, tokens: int) -> torch.Tensor | None: ...

    def opening(self, tokens: int) -> torch.Tensor: ...

    def check(self, seq: int, where: str, kind: str) -> None:
        """Raise ValueError, with these words for the data and the tokenizer, if there is not one sequence in it."""

    def split(self, share: float, seq: int, where: str, kind: str) -> tuple[Part, Part]:
        """Return the part to train on, and a share to validate with.

        Raises:
            ValueError: too little for both.
        """


def _spread(count: int, seq: int, windows: int | None) -> list[int]:
    """Return which of ``count`` sequences are validated: so many, spread evenly."""
    wanted = min(count, max(1, MAX_VALIDATION_TOKENS // seq) if windows is None else windows)
    return [i * count // wanted for i in range(wanted)]


@dataclass(frozen=True)
class Windows:
    """Windows of a text, which begin anywhere in it.

    Attributes:
        ids: integer [tokens], in text order.
    """

    ids: torch.Tensor

    def batch(self, seed: int, step: int, batch: int, seq: int) -> Batch:
        """Return windows that begin at random places."""
        generator = torch.Generator().manual_seed((seed * _GOLDEN + step * 2 + 1) % 2**63)
        return self._at(torch.randint(len(self.ids) - seq, (batch,), generator=generator, device="cpu"), seq)

    def _at(self, starts: torch.Tensor, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.ids[starts[:, None] + torch.arange(seq + 1, device="cpu")].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def steps_per_epoch(self, batch: int, seq: int) -> int:
        """Return the steps that draw as many tokens as the text has."""
        return max(1, -(-(len(self.ids) - 1) // (batch * seq)))

    def in_order(self, batch: int, seq: int, windows: int | None) -> list[Batch]:
        """Return windows side by side."""
        places = _spread((len(self.ids) - 1) // seq, seq, windows)
        inputs, targets = self._at(torch.tensor(places, device="cpu") * seq, seq)
        return list(zip(inputs.split(batch), targets.split(batch), strict=True))

    def question(self, tokens: int) -> None:
        """Return None: a text has no questions."""

    def opening(self, tokens: int) -> torch.Tensor:
        """Return the first tokens."""
        return self.ids[:tokens].long()

    def check(self, seq: int, where: str, kind: str) -> None:
        """Raise ValueError if the text is shorter than a window."""
        if len(self.ids) < seq + 1:
            raise ValueError(
                f"{where} has {len(self.ids)} tokens ({kind}), and --seq {seq} needs at least {seq + 1}: give more "
                "text or a smaller --seq"
            )

    def split(self, share: float, seq: int, where: str, kind: str) -> tuple[Windows, Windows]:
        """Hold out the end of the text."""
        count = len(self.ids)
        held_out = max(int(count * share), seq + 1)
        if count - held_out < seq + 1:
            raise ValueError(
                f"{where} has {count} tokens ({kind}), and --seq {seq} needs at least {2 * (seq + 1)}: one sequence to "
                f"train on and one to validate; give more text or a smaller --seq"
            )
        return Windows(self.ids[: count - held_out]), Windows(self.ids[count - held_out :])


@dataclass(frozen=True)
class Rows:
    """Documents in rows.

    Attributes:
        tokens: integer [tokens], of all documents.
        ends: int64 [documents], where each document's tokens end.
        trained: uint8 [tokens], 1 for tokens that are learnt; None for all.
        chosen: bool [documents], those of this part; None for all.
        pack: whether a row holds several documents.
        made_from: what the documents are made from, to keep their rows by.
    """

    tokens: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    trained: np.ndarray[Any, Any] | None
    chosen: np.ndarray[Any, Any] | None
    pack: bool
    made_from: Mapping[str, Any]
    _layouts: dict[int, Arrays] = field(default_factory=dict, repr=False, compare=False)

    def batch(self, seed: int, step: int, batch: int, seq: int) -> Batch:
        """Return rows in the order of a shuffled epoch; the last batch of an epoch goes on into the next one."""
        count = len(self._layout(seq)["rows"])
        places = np.arange(step * batch, (step + 1) * batch)
        epochs = places // count
        rows = [
            shuffled(places[epochs == epoch] % count, count, seed, int(epoch))
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return self._filled(np.concatenate(rows), seq)

    def steps_per_epoch(self, batch: int, seq: int) -> int:
        """Return the steps that show every row once."""
        return -(-len(self._layout(seq)["rows"]) // batch)

    def in_order(self, batch: int, seq: int, windows: int | None) -> list[Batch]:
        """Return rows in their order."""
        places = np.array(_spread(len(self._layout(seq)["rows"]), seq, windows))
        return [self._filled(places[start : start + batch], seq) for start in range(0, len(places), batch)]

    def question(self, tokens: int) -> torch.Tensor | None:
        """Return the beginning of a document before its first trained token."""
        if self.trained is None:
            return None
        for document in self._first(_SOME):
            start, end = self._range(document)
            learnt = np.flatnonzero(self.trained[start : min(end, start + tokens)])
            if len(learnt) and learnt[0]:
                return torch.from_numpy(self.tokens[start : start + int(learnt[0])].astype(np.int64))
        return None

    def opening(self, tokens: int) -> torch.Tensor:
        """Return the first document's beginning."""
        start, end = self._range(self._first(1)[0])
        return torch.from_numpy(self.tokens[start : min(end, start + tokens)].astype(np.int64))

    def _first(self, count: int) -> list[int]:
        """Return the first documents of this part."""
        chosen = np.arange(min(count, len(self.ends))) if self.chosen is None else np.flatnonzero(self.chosen)[:count]
        return [int(document) for document in chosen]

    def _range(self, document: int) -> tuple[int, int]:
        return int(self.ends[document - 1]) if document else 0, int(self.ends[document])

    def check(self, seq: int, where: str, kind: str) -> None:
        """Make the rows: there always is one."""
        assert len(self._layout(seq)["rows"]), where

    def split(self, share: float, seq: int, where: str, kind: str) -> tuple[Rows, Rows]:
        """Hold out documents from all over."""
        count = len(self.ends)
        if count < 2:
            raise ValueError(
                f"{where} has one document, and at least two are needed: one to train on and one to validate; give "
                "more, or a file for --val-data"
            )
        held_out = np.zeros(count, dtype=bool)
        held_out[shuffled(np.arange(max(1, int(count * share))), count, 0, 0)] = True
        keys = ({**self.made_from, "share": share, "held out": part} for part in (False, True))
        train, validation = (
            Rows(self.tokens, self.ends, self.trained, chosen, self.pack, key)
            for chosen, key in zip((~held_out, held_out), keys, strict=True)
        )
        for part in (train, validation):
            part.check(seq, where, kind)
        return train, validation

    def _layout(self, seq: int) -> Arrays:
        """Return where rows of ``seq`` inputs are: "starts" and "lengths" int64 [pieces]; "rows" int64 [rows], where
        each row's pieces end.
        """
        if seq not in self._layouts:
            made_from = {**self.made_from, "rows of": seq, "packed": self.pack}

            def make(writer: Writer) -> Mapping[str, Any]:
                pieces = 0
                for starts, lengths, counts in packed_rows(self.ends, self.trained, self.chosen, seq, pack=self.pack):
                    writer.append("starts", starts, np.int64)
                    writer.append("lengths", lengths, np.int64)
                    writer.append("rows", pieces + np.cumsum(counts), np.int64)
                    pieces += len(starts)
                return {"pieces": pieces}

            self._layouts[seq] = kept_arrays(made_from, make)
        return self._layouts[seq]

    def _filled(self, rows: np.ndarray[Any, Any], seq: int) -> Batch:
        """Return inputs and targets of rows; behind their documents is one of zeros, from which nothing is learnt."""
        layout = self._layout(seq)
        starts, lengths, ends = layout["starts"], layout["lengths"], layout["rows"]
        ids = np.zeros((len(rows), seq), dtype=np.int64)
        targets = np.full((len(rows), seq), IGNORED, dtype=np.int64)
        positions = np.empty((len(rows), seq), dtype=np.int64)
        count = np.arange(seq)
        for row, which in enumerate(rows.tolist()):
            at = 0
            for piece in range(int(ends[which - 1]) if which else 0, int(ends[which])):
                start, length = int(starts[piece]), int(lengths[piece])
                until = at + length
                ids[row, at:until] = self.tokens[start : start + length]
                positions[row, at:until] = count[:length]
                targets[row, at:until] = self.tokens[start + 1 : start + length + 1]
                if self.trained is not None:
                    targets[row, at:until][self.trained[start + 1 : start + length + 1] == 0] = IGNORED
                at = until
            positions[row, at:] = count[: seq - at]
        inputs, wanted = torch.from_numpy(ids), torch.from_numpy(targets)
        return ({"input_ids": inputs, "position_ids": torch.from_numpy(positions)} if self.pack else inputs), wanted
