"""JSON Lines: a row a line, each a JSON object."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator

from spu.data.rows import Row

__all__ = ["jsonl_rows"]

_AS_LINES = 'python -c "import json; [print(json.dumps(row)) for row in json.load(open({path!r}))]" > rows.jsonl'


def jsonl_rows(path: str, label: str, seen: Callable[[int], object]) -> Iterator[Row]:
    """Yield the rows of a file, each with the place where it stands. Empty lines are passed over.

    Args:
        path: of the file.
        label: the option that named it, for messages.
        seen: is given the bytes of each line.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, or no object; names the line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            seen(len(line))
            where = f"{label} {path}, line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} is not in UTF-8 (byte {error.start} is 0x{line[error.start]:02x}): convert the file, "
                    f"e.g. iconv -f ISO-8859-1 -t UTF-8 {path} > utf8.jsonl, or from whatever it is in"
                ) from None
            except (json.JSONDecodeError, RecursionError) as error:
                if line.lstrip().startswith(b"["):
                    raise ValueError(_array(where, path)) from None
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
                raise ValueError(f"{where} is not JSON ({what}): each line must be one JSON object") from None
            if isinstance(row, list):
                raise ValueError(_array(where, path))
            if not isinstance(row, dict):
                got = line.decode()[:40].strip()
                raise ValueError(f'{where} must be a JSON object, as {{"text": "..."}}, got {got}')
            yield where, row


def _array(where: str, path: str) -> str:
    return (
        f"{where} begins a JSON array, and each line must be one JSON object: write its rows as lines, e.g. "
        + _AS_LINES.format(path=path)
    )
