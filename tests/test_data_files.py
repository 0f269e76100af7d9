"""Which files are meant: paths, patterns, folders, in one order on every machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from spu.data.files import find_files


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "sub/c.PARQUET", "sub/d.txt", ".hidden/e.txt", "sub/.f.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_and_patterns_are_sorted_and_endings_say_the_kind(place: Path) -> None:
    found = [(file.path, file.kind) for file in find_files([str(place)])]
    names = ["a.jsonl", "b.jsonl", "sub/c.PARQUET", "sub/d.txt"]
    assert found == [
        (str(place / name), kind) for name, kind in zip(names, ["jsonl"] * 2 + ["parquet", "text"], strict=True)
    ]
    assert [file.path for file in find_files(["b.jsonl", "*.jsonl"[:1] + ".md", "sub/*.txt"])] == [
        "b.jsonl",
        "notes.md",
        "sub/d.txt",
    ]
    (place / "table").write_bytes(b"PAR1....")
    assert [file.kind for file in find_files(["table", "missing"])] == ["parquet", "text"]
    (place / "[1].txt").touch()
    assert [file.path for file in find_files(["[1].txt"])] == ["[1].txt"], "a name that looks like a pattern"


def test_a_saved_dataset_is_one_source(place: Path) -> None:
    (place / "sub" / "dataset_info.json").touch()
    assert [(file.path, file.kind) for file in find_files(["sub"])] == [("sub", "dataset")]


def test_what_means_no_file_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"--val-data \*.csv: no file has such a name"):
        find_files(["*.csv"], "--val-data")
    (place / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data empty is a folder without files that end in .txt, .jsonl"):
        find_files(["empty"])
    with pytest.raises(ValueError, match=r"--data sub/../a.jsonl is given twice"):
        find_files(["a.jsonl", "sub/../a.jsonl"])
