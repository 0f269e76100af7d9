"""Documents from files to batches: what is learnt, what is kept, and inputs that are refused with their line."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import run
from tiny_models import chat, model_folder, tokenizer_folder, write_rows

pytest.importorskip("transformers")

from spu.common.files import cache_directory
from spu.data import documents, stream
from spu.data.corpus import Corpus, make_corpus
from spu.data.documents import tokenised_documents
from spu.data.files import find_files
from spu.data.store import kept_arrays
from spu.data.tokenizer import ByteTokenizer, FileTokenizer

WORDS = ["the fox", "a quick brown dog jumps", "thank you", "I am fine, how are you today?", "over", "😀 naïve"]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Q{n}: ", "response": WORDS[n % 6] + str(n)} for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return FileTokenizer(tokenizer_folder(tmp_path_factory.mktemp("t")))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path / "cache"))


def quiet(text: str) -> None:
    pass


def documents_of(batches: list[tuple[Any, torch.Tensor]], tokenizer: Any) -> list[tuple[str, str]]:
    """Return (inputs, learnt tokens) as text of each document in rows, where position_ids begin at 0."""
    found = []
    for inputs, targets in batches:
        for ids, positions, wanted in zip(inputs["input_ids"], inputs["position_ids"], targets, strict=True):
            cuts = [*torch.nonzero(positions == 0)[:, 0].tolist(), len(ids)]
            for begin, end in itertools.pairwise(cuts):
                assert torch.equal(positions[begin:end], torch.arange(end - begin))
                learnt = wanted[begin:end]
                if (learnt >= 0).any():
                    found.append((
                        tokenizer.decode(ids[begin:end].tolist()), tokenizer.decode(learnt[learnt >= 0].tolist())
                    ))  # fmt: skip
    return found


def epoch_of(corpus: Corpus, seed: int, batch: int, seq: int) -> list[tuple[Any, torch.Tensor]]:
    return [corpus.batch(seed, step, batch, seq) for step in range(corpus.steps_per_epoch(batch, seq))]


def test_responses_are_learnt_and_prompts_are_not(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    rows = pairs(40)
    corpus = make_corpus(write_rows(tmp_path / "a.jsonl", rows), tokenizer, 64, quiet)
    seen = documents_of([*epoch_of(corpus, 0, 1, 64), *corpus.validation_batches(2, 64)], tokenizer)
    assert sorted(learnt for _, learnt in seen) == sorted(row["response"] + "<|end|>" for row in rows)
    assert sorted(text for text, _ in seen) == sorted(row["prompt"] + row["response"] for row in rows)
    assert len(documents_of(corpus.validation_batches(2, 64), tokenizer)) == 2, "a twentieth"
    used = torch.cat([y for _, y in epoch_of(corpus, 0, 1, 64)])
    assert (used >= 0).any(1).all()
    question = corpus.question(64)
    assert question is not None
    assert tokenizer.decode(question.tolist()) in {row["prompt"].rstrip() for row in rows} | {r["prompt"] for r in rows}


def test_epochs_show_every_row_once_in_other_orders(tmp_path: Path) -> None:
    corpus = make_corpus(write_rows(tmp_path / "a.jsonl", pairs(60)), ByteTokenizer(), 40, quiet)
    steps = corpus.steps_per_epoch(1, 40)
    orders = [
        [tuple(corpus.batch(seed, step, 1, 40)[0]["input_ids"][0].tolist()) for step in range(start, start + steps)]
        for seed, start in ((0, 0), (0, steps), (1, 0))
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3
    together = [tuple(row.tolist()) for step in range(steps) for row in corpus.batch(0, step, 4, 40)[0]["input_ids"]]
    assert together[: 2 * steps] == orders[0] + orders[1], "batches of any size go on where the last one ended"


def test_packing_off_gives_a_row_to_each_document(tmp_path: Path) -> None:
    rows = [{"text": "x" * 25}, {"text": "ab"}, {"text": "cde"}]
    corpus = make_corpus(write_rows(tmp_path / "a.jsonl", rows), ByteTokenizer(), 8, quiet, pack=False)
    found = sorted(
        (bytes(ids.tolist()), [int(t) for t in wanted])
        for inputs, targets in [*epoch_of(corpus, 0, 1, 8), *corpus.validation_batches(1, 8)]
        for ids, wanted in zip(inputs, targets, strict=True)
    )
    x, out = ord("x"), -100
    assert found == [
        (b"a" + bytes(7), [ord("b"), *[out] * 7]),
        (b"cd" + bytes(6), [ord("d"), ord("e"), *[out] * 6]),
        *[(b"x" * 8, [x] * 8)] * 3,
    ]


def test_texts_chats_and_tables_go_together(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_rows(tmp_path / "a.jsonl", [chat("hi", "fine", system="s"), chat("how?", "over", "and?", "dog")])
    rows = [{"instruction": "Say it", "input": "a fox", "output": "fox"}, {"instruction": "Go", "output": "ok"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    messages = pyarrow.Table.from_pylist([chat("a", "parquet chat"), chat("b", "two", "c", "three")])
    parquet.write_table(messages, tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("the whole text")
    said: list[str] = []
    (tmp_path / "v.jsonl").write_text('\n{"text": "validation"}\n\n')
    corpus = make_corpus(
        [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.parquet", "d.txt")],
        tokenizer,
        96,
        said.append,
        val_data=str(tmp_path / "v.jsonl"),
    )
    learnt = sorted(part for _, part in documents_of(epoch_of(corpus, 0, 1, 96), tokenizer))
    end = "<|im_end|>"
    wanted = [
        f"fine{end}",
        f"over{end}dog{end}",
        "fox<|end|>",
        "ok<|end|>",
        f"parquet chat{end}",
        f"two{end}three{end}",
    ]
    assert learnt == sorted([*wanted, " whole text<|end|>"])
    assert [part for _, part in documents_of(corpus.validation_batches(1, 96), tokenizer)] == ["alidation<|end|>"]
    assert [line.split(": ")[1].split(",")[0] for line in said] == [
        "chats",
        "instructions and outputs",
        "chats",
        "texts",
    ]
    assert ("Say it\n\na fox\n\nfox", "fox<|end|>") in documents_of(epoch_of(corpus, 0, 1, 96), tokenizer)


@pytest.mark.leaks_threads  # of tqdm, while the dataset is made
def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([{"n": n, "text": f"row {n}"} for n in range(300)])
    table.filter(lambda row: row["n"] % 2 == 0).save_to_disk(tmp_path / "saved")
    corpus = make_corpus(str(tmp_path / "saved"), ByteTokenizer(), 32, quiet)
    seen = documents_of([*epoch_of(corpus, 0, 1, 32), *corpus.validation_batches(1, 32)], ByteTokenizer())
    assert sorted(learnt for _, learnt in seen) == sorted(f"ow {n}" for n in range(0, 300, 2))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"both has the parts train, test: give one, e.g. .*both/train"):
        make_corpus(str(tmp_path / "both"), ByteTokenizer(), 32, quiet)


@pytest.mark.usefixtures("empty_cache")
def test_tokens_are_made_once_and_again_where_they_are_damaged(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    path = write_rows(tmp_path / "a.jsonl", pairs(40))
    said: list[str] = []
    first = make_corpus(path, tokenizer, 32, said.append)
    assert len(said) == 1
    folders = sorted(cache_directory().glob("tokens/*"))
    (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl")
    again = make_corpus(str(tmp_path / "moved.jsonl"), tokenizer, 32, said.append)
    assert len(said) == 1, "read again"
    assert first.sha256 == again.sha256
    assert sorted(cache_directory().glob("tokens/*")) == folders
    for file in cache_directory().glob("tokens/*/*.bin"):
        file.write_bytes(file.read_bytes()[:-1])
    healed = make_corpus(str(tmp_path / "moved.jsonl"), tokenizer, 32, said.append)
    assert len(said) == 2
    for corpus in (again, healed):  # a file that is mapped keeps its contents where another takes its place
        assert torch.equal(corpus.batch(0, 3, 4, 32)[1], first.batch(0, 3, 4, 32)[1])
    other = make_corpus(str(tmp_path / "moved.jsonl"), ByteTokenizer(), 32, said.append)
    assert len(said) == 3, "another tokenizer"
    assert other.top > 200


def test_long_documents_are_tokenised_part_by_part(
    tmp_path: Path, tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(WORDS) * 60
    path = write_rows(tmp_path / "a.jsonl", [{"text": "short"}, {"text": long}, {"text": "end"}])
    (tmp_path / "b.txt").write_text(long)
    (files,) = find_files([path])
    whole = tokenised_documents([files], "whole", tokenizer, quiet)
    for module in (stream, documents):
        monkeypatch.setattr(module, "PIECE", 600)
    both = [files, *find_files([str(tmp_path / "b.txt")])]
    parts = tokenised_documents(both, "parts", tokenizer, quiet)
    assert parts["tokens"][: len(whole["tokens"])].tolist() == whole["tokens"].tolist()
    assert parts["ends"][:3].tolist() == whole["ends"].tolist()
    start, end = whole["ends"][0], whole["ends"][1]
    assert parts["tokens"][len(whole["tokens"]) :].tolist() == whole["tokens"][start:end].tolist(), "the text file"


@pytest.mark.usefixtures("empty_cache")
def test_arrays_are_whole_or_not_there(tmp_path: Path) -> None:
    def fail(writer: Any) -> dict:
        writer.append("a", np.arange(5), np.int64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_arrays({"x": 1}, fail)
    assert list((cache_directory() / "tokens").iterdir()) == []

    def make(writer: Any) -> dict:
        writer.append("a", np.arange(5), np.uint8)
        writer.append("none", np.arange(0), np.int64)
        faster = threading.Thread(
            target=kept_arrays, args=({"x": 1}, lambda other: other.append("a", np.arange(3), np.uint8) or {"by": 2})
        )
        faster.start()
        faster.join()
        return {"by": 1}

    arrays = kept_arrays({"x": 1}, make)  # another process was faster
    assert arrays.meta == {"by": 2}
    assert arrays["a"].tolist() == [0, 1, 2]
    assert kept_arrays({"x": 2}, make)["none"].tolist() == []


GOOD = '{"prompt": "a", "response": "b"}\n'
BAD = [
    ("bad.jsonl", GOOD + "{'prompt': 1}\n", r"line 2 is not JSON \(Expecting property name.* at column 2\)"),
    ("bad.jsonl", "[" + GOOD.strip() + "]\n", r"line 1 begins a JSON array"),
    ("bad.jsonl", '["a"\n', r"line 1 begins a JSON array"),
    ("bad.jsonl", GOOD + "3\n", "line 2 must be a JSON object"),
    ("bad.jsonl", '{"question": "a", "answer": "b"}\n', "line 1 has the columns answer, question: rename them to"),
    ("bad.jsonl", GOOD + '\n{"text": "a"}\n', "line 3 has the columns text, and the rows before it prompt and"),
    ("bad.jsonl", '{"text": 3}\n', "line 1: text must be text, got int 3"),
    ("bad.jsonl", '{"text": null}\n', "line 1: text must be text, got NoneType None"),
    ("bad.jsonl", '{"text": "abc \\ud800"}\n', "line 1: its character 4 is half of a surrogate pair"),
    ("bad.jsonl", GOOD + '{"prompt": "a", "response": ""}\n', "line 2: its response is empty, so there is nothing"),
    ("bad.jsonl", GOOD + '{"prompt": "a", "response": "b', "line 2 is not JSON"),
    ("bad.jsonl", '{"text": "x"}\n', "line 1: no token of it is trained, so there is nothing to learn: remove it"),
    ("bad.jsonl", GOOD.encode() + '{"text": "é"}'.encode("latin-1"), r"line 2 is not in UTF-8 \(byte 10 is 0xe9\)"),
    ("bad.jsonl", GOOD.encode("utf-16"), "line 1 is not in UTF-8"),
    ("bad.jsonl", "\n\n", " is empty: give a file with something to learn from"),
    ("bad.jsonl", GOOD, " has one document, and at least two are needed"),
    ("bad.jsonl", json.dumps({"messages": [{"content": "a"}]}), "line 1: message 1 has no role"),
    ("bad.parquet", b"PAR1" + bytes(40), " is no whole Parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "what"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, name: str, content: Any, what: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"--data .*{name}.*{what}"):
        make_corpus(str(tmp_path / name), ByteTokenizer(), 8, quiet)
    assert not list(cache_directory().glob("tokens/.*")), "left behind"


def test_tables_are_refused_by_their_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def refused(rows: list[dict[str, Any]], what: str) -> None:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=f"--data .*t.parquet.*{what}"):
            make_corpus(str(tmp_path / "t.parquet"), ByteTokenizer(), 8, quiet)

    refused([{"text": ["a", "b"]}], r"its column text is list<.*string>: it must be text")
    refused([{"text": "abc"}, {"text": None}], "row 2: text must be text, got NoneType")
    refused([{"messages": "abc"}], "its column messages is string: it must be a list of role and content")
    refused([{"n": 1}], "has the columns n: rename them")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        make_corpus(str(tmp_path / "t.parquet"), ByteTokenizer(), 8, quiet)


def test_the_command_trains_on_chats_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    rows = [chat(f"How are {n}?", f"I am fine {n}.", "and you?", "thank you") for n in range(24)]
    write_rows(tmp_path / "a.jsonl", rows[:12])
    write_rows(tmp_path / "b.jsonl", rows[12:])
    job = ["train", "--data", "a.jsonl", "--data", "b.jsonl", "--model", "model", "--seq", "64", "--batch", "4"]
    job += ["--microbatches", "2", "--devices", "cpu", "--recompute", "off", "--schedule", "gpipe"]
    assert run(*job, "--name", "r", "--steps", "2", "--compare") == 0
    summary, plain = (
        json.loads((tmp_path / "runs" / "r" / f"{name}.json").read_text()) for name in ("summary", "reference")
    )
    assert abs(summary["val_loss"] - plain["val_loss"]) < 0.01
    assert summary["prompt"].endswith("assistant\n")
    capsys.readouterr()
    write_rows(tmp_path / "b.jsonl", rows[11:])
    assert run("train", "--resume", "r", "--steps", "6") == 2
    assert "has changed since the run began" in capsys.readouterr().err
    write_rows(tmp_path / "bad.jsonl", [*rows, {"messages": []}])
    assert run("train", "--data", "bad.jsonl", "--model", "model", "--name", "bad") == 2
    assert "bad.jsonl, line 25: messages must be a list" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "bad").exists()
