"""Tokenising part by part: the same tokens as at once, in order, and errors that arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tokenizer_folder

pytest.importorskip("transformers")

from spu.data import stream
from spu.data.stream import Progress, in_threads, token_stream
from spu.data.tokenizer import ByteTokenizer, FileTokenizer

TEXT = "Voilà: the quick brown fox.\n\nIt jumps over the lazy dog, naïvely.\n" * 40


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return FileTokenizer(tokenizer_folder(tmp_path_factory.mktemp("t"), kind=request.param, text=TEXT))


@pytest.mark.parametrize("join", ["\n", " ", ""], ids=["lines", "one line", "one word"])
@pytest.mark.parametrize("size", [7, 600, 10**6])
def test_part_by_part_gives_the_same_tokens(
    tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch, join: str, size: int
) -> None:
    lines = TEXT.splitlines() if join else ["x" * 3000, "y" * 1000]
    text = (join.join(lines) + "\n\n  indented\n").encode()
    whole = tokenizer.encode(text)
    monkeypatch.setattr(stream, "PIECE", 500)
    parts = list(token_stream((text[at : at + size] for at in range(0, len(text), size)), tokenizer))
    assert torch.equal(torch.cat(parts), whole)
    assert len(parts) >= 3 or not join, "it was not cut"


def test_tokens_are_those_that_transformers_gives(tokenizer: FileTokenizer) -> None:
    expected = tokenizer._tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(TEXT.encode()).tolist() == expected


def test_bytes_go_through_as_they_are() -> None:
    assert torch.cat(list(token_stream([b"ab", b"\xff"], ByteTokenizer()))).tolist() == [97, 98, 255]
    assert list(token_stream([], ByteTokenizer())) == []


def test_results_come_in_order_and_errors_arrive() -> None:
    assert list(in_threads(lambda n: n * n, range(100))) == [n * n for n in range(100)]

    def fail(n: int) -> int:
        if n == 5:
            raise ValueError("line 5")
        return n

    seen = []
    with pytest.raises(ValueError, match="line 5"):
        for result in in_threads(fail, range(1000)):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]


def test_progress_is_said_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    progress = Progress("F", 3_000_000, said.append)
    progress.add(1_000_000)
    assert said == []
    monkeypatch.setattr(stream, "_REPORT_S", -1.0)
    progress.add(1_000_000)
    Progress("G", 0, said.append).add(1_000_000)
    assert said == ["tokenising F: 2 of 3 MB", "tokenising G: 1 MB"]


def test_a_tokenizer_that_cuts_texts_off_is_not_asked_to(tmp_path: Path) -> None:
    """tokenizer.json may hold the truncation and the padding that it was saved with."""
    folder = tokenizer_folder(tmp_path)
    import tokenizers

    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = file.encode(TEXT, add_special_tokens=False).ids
    file.enable_truncation(8)
    file.enable_padding(length=8)
    file.save(str(folder / "tokenizer.json"))
    assert FileTokenizer(folder).encode(TEXT.encode()).tolist() == whole
    assert len(FileTokenizer(folder).encode(b"x")) == 1
