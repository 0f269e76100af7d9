"""Text files: read in pieces, and checked to be text; else the error says what it is, and how to make text of it."""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["Text", "default_text", "open_text"]

# How files begin that are often given for text, what they are, and what to do.
_UNPACK = "unpack it first: {command}, and give the file that comes out"
_TABLE = "write its text column to a file first, e.g. with pandas.read_feather({path!r})['text'], and give that"
_KNOWN: list[tuple[bytes, str, str]] = [
    (b"PAR1", "a Parquet file", "give its name the ending .parquet"),
    (b"ARROW1", "an Arrow file", _TABLE),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write its text column to a file first, and give that"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK.replace("{command}", "gunzip -k {path}")),
    (b"BZh91AY&SY", "compressed by bzip2", _UNPACK.replace("{command}", "bunzip2 -k {path}")),
    (b"\xfd7zXZ\x00", "compressed by xz", _UNPACK.replace("{command}", "unxz -k {path}")),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK.replace("{command}", "unzstd {path}")),
    (b"PK\x03\x04", "a zip archive", _UNPACK.replace("{command}", "unzip {path}")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.replace("{command}", "7z x {path}")),
    (b"%PDF-", "a PDF", "take its text out first, e.g. pdftotext {path}, and give that"),
    (b"\xd0\xcf\x11\xe0", "an Office document", "save it as plain text, and give that"),
    (b"{\\rtf", "an RTF document", "save it as plain text, and give that"),
    (b"SQLite format 3\x00", "a SQLite database", "write its texts to a file first, and give that"),
    (b"\x93NUMPY", "a NumPy array", "give the text that it was made from"),
    (b"\x89HDF", "an HDF5 file", "write its texts to a file first, and give that"),
    (b"\x89PNG", "a picture", "give a text file"),
    (b"\xff\xd8\xff", "a picture", "give a text file"),
    (b"\x7fELF", "a program", "give a text file"),
    (b"\x80\x02", "a pickle", "give the text that it was made from"),
    (b"\x80\x04", "a pickle", "give the text that it was made from"),
    (b"\x80\x05", "a pickle", "give the text that it was made from"),
]
_ENCODE = "convert it first: iconv -f {encoding} -t UTF-8 {path} > {path}.utf8, and give that"
_MARKS = [
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
]
_JSON = re.compile(rb'\s*(\{\s*"(?:[^"\\]|\\.)*"\s*:|\[\s*(?:\{\s*"|"(?:[^"\\]|\\.)*"\s*[,\]]))')
_LINE_OF_JSON = re.compile(rb"\s*\{[^\n]*\}\s*\n\s*\{")
_CONTROL = bytes(sorted({*range(32)} - {*b"\t\n\r\f\v\x1b"}))
_PIECE = 1 << 20


@dataclass(frozen=True)
class Text:
    """A text that is read in pieces.

    Attributes:
        name: where it came from.
        sha256: of the clean text.
        utf8: whether it is text in UTF-8; other bytes are for models of bytes.
        size: bytes of the file.
        opened: opens the file.
    """

    name: str
    sha256: str
    utf8: bool
    size: int
    opened: Callable[[], BinaryIO]

    def pieces(self) -> Iterator[bytes]:
        """Yield the text without a byte-order mark and, in UTF-8, with lines that end in a newline alone."""
        with self.opened() as stream:
            yield from _clean(stream, newlines=self.utf8)


def open_text(path: str, label: str = "--data") -> Text:
    """Check a text file, in one pass over it.

    Args:
        path: of the file.
        label: the option that named it, for messages.

    Raises:
        ValueError: missing, unreadable, empty, a table, an archive, JSON, a text in another encoding; the message says
            which and what to do.
    """

    try:
        if Path(path).is_fifo():  # it can be read once
            content = Path(path).read_bytes()
            return _checked(path, label, lambda: io.BytesIO(content))
        return _checked(path, label, lambda: open(path, "rb"))
    except FileNotFoundError:
        raise ValueError(f"{label} {path}: no such file: give the path of a text file") from None
    except OSError as error:
        raise ValueError(f"{label} {path} cannot be read ({error.strerror}): give a readable text file") from error


def default_text() -> Text:
    """Return Python's language reference, which every CPython ships."""
    from pydoc_data.topics import topics

    content = "\n".join(topics[name] for name in sorted(topics)).encode()
    return Text(
        "pydoc_data.topics", hashlib.sha256(content).hexdigest(), True, len(content), lambda: io.BytesIO(content)
    )


def _checked(path: str, label: str, opened: Callable[[], BinaryIO]) -> Text:
    with opened() as stream:
        head = stream.read(_PIECE)
        if not head:
            raise ValueError(f"{label} {path} is empty: give a text file with something to learn from")
        _check_head(path, label, head)
        stream.seek(0)
        bad, value = _first_not_utf8(_clean(stream, newlines=False))
        stream.seek(0)
        if bad is not None:
            if not any(len(piece.translate(None, _CONTROL)) < len(piece) for piece in _clean(stream, newlines=False)):
                what = f"text, but not in UTF-8 (byte {bad} is 0x{value:02x})"
                raise _refused(
                    path, label, what, _ENCODE.replace("{encoding}", "ISO-8859-1") + "; or whatever it is in"
                )
        else:
            _check_json(path, label, head.removeprefix(codecs.BOM_UTF8))
        stream.seek(0)
        digest = hashlib.sha256()
        for piece in _clean(stream, newlines=bad is None):
            digest.update(piece)
        return Text(path, digest.hexdigest(), bad is None, stream.seek(0, io.SEEK_END), opened)


def _check_head(path: str, label: str, head: bytes) -> None:
    """Raise ValueError where a file's beginning tells that it is no text."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            raise _refused(path, label, f"{encoding} text", _ENCODE.replace("{encoding}", encoding))
    for start, what, fix in _KNOWN:
        if head.startswith(start):
            raise _refused(path, label, what, fix)
    if head[257:262] == b"ustar":
        raise _refused(path, label, "a tar archive", _UNPACK.replace("{command}", "tar -xf {path}"))
    if _half_zeros(head):
        which = "UTF-16LE" if head[1::2].count(0) > head[0::2].count(0) else "UTF-16BE"
        raise _refused(path, label, f"{which} text", _ENCODE.replace("{encoding}", which))


def _check_json(path: str, label: str, head: bytes) -> None:
    if not _JSON.match(head):
        return
    if _LINE_OF_JSON.match(head):
        raise _refused(path, label, "JSON Lines", "give its name the ending .jsonl")
    command = 'python -c "import json; [print(json.dumps(row)) for row in json.load(open({path!r}))]" > rows.jsonl'
    fix = f"write its rows as lines first, each a JSON object, e.g. {command}, and give that"
    raise _refused(path, label, "JSON", fix)


def _clean(stream: BinaryIO, *, newlines: bool) -> Iterator[bytes]:
    """Yield a file without a byte-order mark, and with ``newlines`` without the carriage returns before a newline."""
    held, first = b"", True
    while piece := stream.read(_PIECE):
        piece = piece.removeprefix(codecs.BOM_UTF8) if first else held + piece
        held, first = b"", False
        if newlines and piece.endswith(b"\r"):
            piece, held = piece[:-1], b"\r"
        yield piece.replace(b"\r\n", b"\n") if newlines and b"\r\n" in piece else piece
    if held:
        yield held


def _refused(path: str, label: str, what: str, fix: str) -> ValueError:
    return ValueError(f"{label} {path} is {what}, and would be trained on byte by byte: " + fix.format(path=path))


def _half_zeros(head: bytes) -> bool:
    """Tell whether every second byte is mostly 0, and the others are not: UTF-16 of a European language."""
    if len(head) < 8:
        return False
    even, odd = (head[k::2].count(0) / len(head[k::2]) for k in (0, 1))
    return max(even, odd) > 0.5 and min(even, odd) < 0.1


def _first_not_utf8(pieces: Iterator[bytes]) -> tuple[int | None, int]:
    """Return the place of the first byte that cannot be UTF-8, and the byte; (None, 0) if there is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    for piece in pieces:
        held = decoder.getstate()[0]
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            return done - len(held) + error.start, (held + piece)[error.start]
        done += len(piece)
    held = decoder.getstate()[0]
    return (done - len(held), held[0]) if held else (None, 0)
