"""Checks that a file is text that can be trained on; else the error says what it is, and how to make text of it."""

from __future__ import annotations

import codecs
import re

__all__ = ["clean_text", "is_utf8"]

# How files begin that are often given for text, what they are, and what to do.
_UNPACK = "unpack it first: {command}, and give the file that comes out"
_TABLE = "write its text column to a file first, e.g. with pandas.read_{kind}({path!r})['text'], and give that"
_KNOWN: list[tuple[bytes, str, str]] = [
    (b"PAR1", "a Parquet file", _TABLE.replace("{kind}", "parquet")),
    (b"ARROW1", "an Arrow file", _TABLE.replace("{kind}", "feather")),
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


def clean_text(path: str, content: bytes) -> bytes:
    """Return the contents of a text file in UTF-8, without a byte-order mark and with lines that end in a newline
    alone.

    Bytes that are no text of any kind come back unchanged: a model of bytes can be trained on it (see ``is_utf8``).

    Args:
        path: for messages.
        content: of the file.

    Raises:
        ValueError: a table, an archive, JSON, a text in another encoding; the message says which and what to do.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise _refused(path, f"{encoding} text", _ENCODE.replace("{encoding}", encoding))
    for start, what, fix in _KNOWN:
        if content.startswith(start):
            raise _refused(path, what, fix)
    if content[257:262] == b"ustar":
        raise _refused(path, "a tar archive", _UNPACK.replace("{command}", "tar -xf {path}"))
    head = content[:_PIECE]
    if _half_zeros(head):
        which = "UTF-16LE" if head[1::2].count(0) > head[0::2].count(0) else "UTF-16BE"
        raise _refused(path, f"{which} text", _ENCODE.replace("{encoding}", which))
    content = content.removeprefix(codecs.BOM_UTF8)
    bad = _first_not_utf8(content)
    if bad is not None:
        if len(content.translate(None, _CONTROL)) == len(content):
            what = f"text, but not in UTF-8 (byte {bad} is 0x{content[bad]:02x})"
            raise _refused(path, what, _ENCODE.replace("{encoding}", "ISO-8859-1") + "; or whatever it is in")
        return content
    if _JSON.match(content[:_PIECE]):
        kind = "JSON Lines" if _LINE_OF_JSON.match(content[:_PIECE]) else "JSON"
        fix = "write the texts in it to a file first, and give that"
        if kind == "JSON Lines":
            fix += "; e.g. python -c \"import json; [print(json.loads(l)['text']) for l in open({path!r})]\" > text.txt"
        raise _refused(path, kind, fix)
    return content.replace(b"\r\n", b"\n") if b"\r\n" in content else content


def is_utf8(content: bytes) -> bool:
    return _first_not_utf8(content) is None


def _refused(path: str, what: str, fix: str) -> ValueError:
    return ValueError(f"--data {path} is {what}, and would be trained on byte by byte: " + fix.format(path=path))


def _half_zeros(head: bytes) -> bool:
    """Tell whether every second byte is mostly 0, and the others are not: UTF-16 of a European language."""
    if len(head) < 8:
        return False
    even, odd = (head[k::2].count(0) / len(head[k::2]) for k in (0, 1))
    return max(even, odd) > 0.5 and min(even, odd) < 0.1


def _first_not_utf8(content: bytes) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, max(1, len(content)), _PIECE):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(content[start : start + _PIECE], final=start + _PIECE >= len(content))
        except UnicodeDecodeError as error:
            return start - held + error.start
    return None
