"""Which files ``--data`` means: files, patterns and folders, and what each is."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DataFile", "find_files"]

TEXT, JSONL, CSV, PARQUET, DATASET = "text", "jsonl", "csv", "parquet", "dataset"
_ENDINGS = {
    ".txt": TEXT, ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET, ".pq": PARQUET, ".csv": CSV, ".tsv": CSV,
}  # fmt: skip
_NAMED = {".json": JSONL}  # where it is named: in a folder such a file may as well be a configuration


@dataclass(frozen=True)
class DataFile:
    """A file, or a folder that ``datasets`` has saved.

    Attributes:
        path: of it.
        kind: "text", "jsonl", "csv", "parquet" or "dataset".
        label: the option that named it, for messages.
    """

    path: str
    kind: str
    label: str = "--data"


def find_files(given: Sequence[str], label: str = "--data") -> list[DataFile]:
    """Return the files that are meant by paths, patterns such as ``'shards/*.jsonl'``, and folders.

    The order is the one given; a pattern's and a folder's files are sorted by name. A folder stands for all files in it
    and below whose endings are known.

    Raises:
        ValueError: a pattern or a folder without files, a file that is given twice.
    """
    found: list[DataFile] = []
    for path in given:
        if any(mark in path for mark in "*?[") and not Path(path).exists():
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ValueError(f"{label} {path}: no file has such a name: give a path or a pattern of files")
            found += [file for match in matches for file in _meant_by(match, label)]
        else:
            found += _meant_by(path, label)
    places = [Path(file.path).resolve() for file in found]
    if twice := [file.path for k, file in enumerate(found) if places[k] in places[:k]]:
        raise ValueError(f"{label} {twice[0]} is given twice: give it once")
    return found


def _meant_by(path: str, label: str) -> list[DataFile]:
    folder = Path(path)
    if not folder.is_dir():
        return [DataFile(path, _kind_of(folder), label)]
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return [DataFile(path, DATASET, label)]
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _ENDINGS and file.is_file() and not _hidden(file.relative_to(folder))
    )
    if not files:
        raise ValueError(f"{label} {path} is a folder without files that end in {', '.join(_ENDINGS)}: give one")
    return [DataFile(str(file), _kind_of(file), label) for file in files]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind_of(path: Path) -> str:
    """Return what a file is by its ending; one without a known ending is text, if it is no Parquet file."""
    known = (_ENDINGS | _NAMED).get(path.suffix.lower())
    if known is not None:
        return known
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return PARQUET if file.read(4) == b"PAR1" else TEXT
    except OSError:
        pass  # whoever reads it says what is wrong
    return TEXT
