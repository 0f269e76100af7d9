"""Tables as text: CSV files, whose first row names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from spu.data.rows import Row

__all__ = ["csv_rows"]

_DELIMITERS = ",;\t"  # as programs of the world write them; the one that the first row has most of


def csv_rows(path: str, label: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file in UTF-8, each with the line where it ends. Empty lines are passed over.

    Fields may be quoted, and then hold delimiters and line ends.

    Raises:
        ValueError: a file that is not UTF-8; a column without a name or with another one's; a row with more or fewer
            fields than columns, or with a quote that is not closed; names the line.
    """
    limit = csv.field_size_limit(2**31 - 1)  # a field is a whole text; what a C long holds everywhere
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns: list[str] = []
            try:
                for values in reader:
                    where = f"{label} {path}, line {reader.line_num}"
                    if not values:
                        continue
                    if not columns:
                        columns = _named(values, where)
                        continue
                    if len(values) != len(columns):
                        raise ValueError(
                            f"{where} has {len(values)} fields, and the first row names {len(columns)} columns: put "
                            f'a text that holds {_NAMES[delimiter]} or a line end in "quotes"'
                        )
                    yield where, dict(zip(columns, values))
            except csv.Error as error:
                where = f"{label} {path}, line {reader.line_num}"
                raise ValueError(f'{where} is not CSV ({error}): write a quote within a text as ""') from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{label} {path} is not in UTF-8 (0x{error.object[error.start]:02x}): convert the file, e.g. "
            f"iconv -f ISO-8859-1 -t UTF-8 {path} > utf8.csv, or from whatever it is in"
        ) from None
    finally:
        csv.field_size_limit(limit)


_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


def _named(values: list[str], where: str) -> list[str]:
    columns = [value.strip() for value in values]
    if "" in columns and columns.index("") != 0:  # pandas leaves its index without a name
        raise ValueError(f"{where}: column {columns.index('') + 1} has no name: the first row must name the columns")
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where} names the column {twice} twice: rename one")
    return columns
