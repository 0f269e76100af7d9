"""CSV and TSV files as tables: the documents of the same rows as JSON Lines, and what is refused with its line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_rows

from spu.data.corpus import make_corpus
from spu.data.delimited import csv_rows
from spu.data.documents import content_of, tokenised_documents
from spu.data.files import find_files
from spu.data.tokenizer import ByteTokenizer

ROWS = [
    {"prompt": f"Q{n}, please: ", "response": text}
    for n, text in enumerate(["one", 'he said "two"', "three\nlines\r\nlong", "drei; naïve 😀", " 5 ", "x" * 200_000])
]


def quiet(text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("A.CSV", "\t")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_has_the_documents_of_its_rows(tmp_path: Path, name: str, delimiter: str, encoding: str) -> None:
    """It was trained on as text, quotes and commas and prompts included."""
    limit = csv.field_size_limit()
    with open(tmp_path / name, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["", "prompt", "response"], delimiter=delimiter)  # pandas: its index first
        writer.writeheader()
        writer.writerows({"": str(n), **row} for n, row in enumerate(ROWS))
    found = []
    for path in (str(tmp_path / name), write_rows(tmp_path / "a.jsonl", ROWS)):
        files = find_files([path])
        found.append(tokenised_documents(files, content_of(files), ByteTokenizer(), quiet))
    assert found[0].meta["documents"] == len(ROWS)
    for key in ("tokens", "ends", "trained"):
        np.testing.assert_array_equal(found[0][key], found[1][key])
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"prompt,response\na,b\nc,d,e\n", "line 3 has 3 fields, and the first row names 2 columns: put a text that"),
        (b"prompt;response\na\n", 'that holds a semicolon or a line end in "quotes"'),
        (b'prompt,response\na,"b\n', "is not CSV (unexpected end of data): write a quote within"),
        (b'prompt,response\na,"b"c\n', "line 2 is not CSV ("),
        (b"prompt,,response\na,b,c\n", "line 1: column 2 has no name"),
        (b"text,text\na,b\n", "line 1 names the column text twice"),
        (b"question,answer\na,b\n", "line 2 has the columns answer, question: rename them to one of"),
        (b"prompt,response\na,b\xe9\n", "is not in UTF-8 (0xe9): convert the file, e.g. iconv"),
        (b"prompt,response\na,\n", "line 2: its response is empty"),
        (b"prompt,response\n", "is empty: give a file with something to learn from"),
        (b"", "is empty: give a file with something to learn from"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="bad.csv") as refused:
        make_corpus(str(path), ByteTokenizer(), 8, quiet)
    assert says in str(refused.value)


def test_empty_lines_are_passed_over_and_line_numbers_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\ntext\n"a\nb"\n\nc\n')
    assert list(csv_rows(str(path), "--data")) == [
        (f"--data {path}, line 4", {"text": "a\nb"}),
        (f"--data {path}, line 6", {"text": "c"}),
    ]


def test_rows_in_a_file_called_json_are_read_as_lines_and_an_array_is_refused(tmp_path: Path) -> None:
    """Both were trained on as text: braces, names of columns and prompts included."""
    path = tmp_path / "rows.json"
    write_rows(path, ROWS[:5])
    assert make_corpus(str(path), ByteTokenizer(), 64, quiet).steps_per_epoch(1, 64) is not None
    path.write_text('[\n  {"prompt": "a", "response": "b"}\n]\n')
    with pytest.raises(ValueError, match=r"line 1 begins a JSON array.* > rows.jsonl"):
        make_corpus(str(path), ByteTokenizer(), 64, quiet)
