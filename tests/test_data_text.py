"""What is given as text and is none, or is in another form: recognised by its content, refused with the fix."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from small_runs import run

from spu.data import text as text_module
from spu.data.corpus import make_corpus
from spu.data.text import Text, open_text
from spu.data.tokenizer import ByteTokenizer

TEXT = "Voilà: the quick brown fox.\n\nIt jumps over the lazy dog, naïvely.\n" * 40


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file ``FILE`` is to be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "FILE"


def opened(file: Path, content: bytes) -> Text:
    file.write_bytes(content)
    return open_text(file.name)


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"PAR1" + bytes(100) + b"PAR1", "a Parquet file", "ending .parquet"),
        (b"ARROW1" + bytes(100), "an Arrow file", "pandas.read_feather"),
        (gzip.compress(TEXT.encode()), "compressed by gzip", "gunzip -k FILE"),
        (bz2.compress(TEXT.encode()), "compressed by bzip2", "bunzip2 -k FILE"),
        (lzma.compress(TEXT.encode()), "compressed by xz", "unxz -k FILE"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "compressed by zstd", "unzstd FILE"),
        (b"PK\x03\x04" + bytes(50), "a zip archive", "unzip FILE"),
        (b"text.txt" + bytes(249) + b"ustar" + bytes(255), "a tar archive", "tar -xf FILE"),
        (b"%PDF-1.7\n" + bytes(50), "a PDF", "pdftotext FILE"),
        (b"\x93NUMPY\x01" + bytes(50), "a NumPy array", "give the text"),
        (b"\x80\x04\x95" + bytes(50), "a pickle", "give the text"),
        (TEXT.encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > FILE.utf8"),
        (TEXT.encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE -t UTF-8 FILE"),
        (TEXT.encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE -t UTF-8 FILE"),
        (TEXT.encode("utf-32"), "UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE"),
        (TEXT.encode("latin-1"), r"not in UTF-8 \(byte 4 is 0xe0\)", "iconv -f ISO-8859-1 -t UTF-8 FILE"),
        (json.dumps({"text": TEXT}).encode(), "JSON,", r"write its rows as lines first.*json.load\(open\('FILE'\)\)"),
        (json.dumps([{"text": TEXT}] * 3, indent=1).encode(), "JSON,", "write its rows as lines first"),
        (json.dumps([TEXT, TEXT]).encode(), "JSON,", "write its rows as lines first"),
        (f"{json.dumps({'text': TEXT})}\n".encode() * 3, "JSON Lines", "ending .jsonl"),
    ],
)
def test_what_is_no_text_is_refused_by_name(file: Path, content: bytes, what: str, fix: str) -> None:
    """Training on such bytes went well, without a word."""
    with pytest.raises(ValueError, match=f"--data FILE is (text, but )?{what}.*{fix}"):
        opened(file, content)


@pytest.mark.parametrize("text", ["[Chapter 1]\nOnce.", "{ hello }", "(a) [b] {c}\n", "PARIS", "[1] A footnote."])
def test_text_that_looks_a_little_like_something_else_is_text(file: Path, text: str) -> None:
    assert b"".join(opened(file, text.encode()).pieces()) == text.encode()


def test_line_ends_and_a_byte_order_mark_are_not_trained_on(file: Path) -> None:
    text = opened(file, b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r")
    assert b"".join(text.pieces()) == b"one\ntwo\n\nthree\r"


def test_a_character_across_two_pieces_is_utf8(file: Path) -> None:
    assert opened(file, b"x" * ((1 << 20) - 1) + "é".encode()).utf8
    with pytest.raises(ValueError, match=r"byte 1048575 is 0xc3"):
        opened(file, b"x" * ((1 << 20) - 1) + "é".encode()[:1])
    with pytest.raises(ValueError, match=r"byte 1048575 is 0xe9"):
        opened(file, b"x" * ((1 << 20) - 1) + b"\xe9t\xe9")


def test_other_bytes_are_for_models_of_bytes_and_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 8)
    said: list[str] = []
    corpus = make_corpus(str(tmp_path / "bytes"), ByteTokenizer(), 16, said.append)
    assert len(corpus.train.ids) + len(corpus.validation.ids) == 2048
    assert said == [f"{tmp_path / 'bytes'} is not text: it is trained on byte by byte"]
    tokenizer = ByteTokenizer()
    tokenizer.name = "tokenizer of m"
    with pytest.raises(ValueError, match="is not text in UTF-8, which tokenizer of m needs"):
        make_corpus(str(tmp_path / "bytes"), tokenizer, 16)


def test_a_file_is_refused_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(64))
    with pytest.raises(ValueError, match=r"--data .*t.parquet is a Parquet file"):
        open_text(str(tmp_path / "t.parquet"))
    assert run("train", "--data", tmp_path / "t.parquet", "--out", tmp_path / "runs") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_text_that_can_be_read_once_is_kept_in_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b"one\r\ntwo"))
    writer.start()
    text = open_text(str(tmp_path / "pipe"))
    writer.join()
    assert b"".join(text.pieces()) == b"one\ntwo"
    assert text.sha256 == hashlib.sha256(b"one\ntwo").hexdigest()


def test_line_ends_are_found_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbf\r\r\na\r\n\r\nb\rc\r"
    (tmp_path / "t.txt").write_bytes(content)
    for size in range(4, 12):
        monkeypatch.setattr(text_module, "_PIECE", size)
        assert b"".join(open_text(str(tmp_path / "t.txt")).pieces()) == content[3:].replace(b"\r\n", b"\n")
