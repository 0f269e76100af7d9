"""Tables of Arrow: Parquet files, and folders that ``datasets`` has saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from spu.common.errors import first_line
from spu.data.rows import FORMS, Form, Row, form_of

__all__ = ["dataset_rows", "parquet_rows"]

_ROWS = 256  # that are read at once


def parquet_rows(path: str, label: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file, each with the place where it stands; columns that are not used are not read.

    Raises:
        ValueError: pyarrow is not installed; the file is damaged; a column of text holds something else.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{label} {path}: Parquet files need a package more: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = _checked(file.schema_arrow, f"{label} {path}")
            batches = file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)
            yield from _named(batches, f"{label} {path}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{label} {path} is no whole Parquet file ({first_line(error)}): write it again") from error


def dataset_rows(path: str, label: str) -> Iterator[Row]:
    """Yield the rows of a folder that ``Dataset.save_to_disk`` has written.

    Raises:
        ValueError: datasets is not installed; the folder is damaged; a column of text holds something else.
    """
    try:
        import datasets
        import pyarrow
    except ImportError:
        raise ValueError(f"{label} {path}: a saved dataset needs a package more: pip install datasets") from None
    try:
        table = datasets.load_from_disk(path)
        if not isinstance(table, datasets.Dataset):
            some = next(iter(table))
            raise ValueError(f"{label} {path} has the parts {', '.join(table)}: give one, e.g. {path}/{some}")
        columns = _checked(table.features.arrow_schema, f"{label} {path}")
        table = table.select_columns(columns).with_format("arrow")
        pieces = (table[start : start + _ROWS] for start in range(0, len(table), _ROWS))
        yield from _named(pieces, f"{label} {path}")
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ValueError(
            f"{label} {path} is no whole dataset ({first_line(error)}): save it again with save_to_disk"
        ) from error


def _named(pieces: Iterable[Any], where: str) -> Iterator[Row]:
    rows = (row for piece in pieces for row in piece.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield f"{where}, row {number}", row


def _checked(schema: Any, where: str) -> list[str]:
    """Return the columns to read.

    Raises:
        ValueError: see ``form_of``; or a column of text that holds something else.
    """
    from pyarrow import types

    form: Form = form_of(schema.names, where)
    columns = [name for name in (*form.columns, *form.optional) if name in schema.names]
    for name in columns:
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if form is FORMS[0]:
            if not (types.is_list(inner) or types.is_large_list(inner)) or not types.is_struct(inner.value_type):
                raise ValueError(f"{where}: its column {name} is {kind}: it must be a list of role and content")
        elif not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
            raise ValueError(f"{where}: its column {name} is {kind}: it must be text; write it as a string")
    return columns
