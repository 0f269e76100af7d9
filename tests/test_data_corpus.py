"""Text, tokens, batches: what every step trains on is a function of (seed, step)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spu.data.corpus import Corpus, make_corpus
from spu.data.parts import Windows
from spu.data.text import default_text, open_text
from spu.data.tokenizer import ByteTokenizer


def corpus_of(length: int) -> Corpus:
    ids = torch.arange(length, dtype=torch.int32)
    return Corpus("numbers", "0", Windows(ids[: length * 9 // 10]), Windows(ids[length * 9 // 10 :]), length - 1)


def test_default_text_is_the_language_reference():
    made = default_text()
    text = b"".join(made.pieces())
    assert made.name == "pydoc_data.topics"
    assert len(text) > 300_000
    assert text == b"".join(default_text().pieces())
    assert b"coroutine" in text


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), batch=st.integers(1, 9), seq=st.integers(1, 40))
def test_batches_depend_on_seed_and_step_alone(seed, step, batch, seq):
    corpus = corpus_of(1000)
    torch.manual_seed(seed % 7)  # the global generator must not matter
    inputs, targets = corpus.batch(seed, step, batch, seq)
    again = corpus_of(1000).batch(seed, step, batch, seq)
    assert torch.equal(inputs, again[0])
    assert torch.equal(targets, inputs + 1), "targets are the next tokens"
    assert inputs.shape == (batch, seq)
    assert inputs.dtype == torch.int64
    assert int(targets.max()) < 900, "validation tokens are never trained on"


def test_batches_of_other_steps_and_seeds_differ():
    corpus = corpus_of(100_000)
    batches = [corpus.batch(seed, step, 4, 16)[0] for seed in range(3) for step in range(20)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches)


def test_every_start_can_be_drawn():
    corpus = corpus_of(20)  # 18 to train on: sequences of 15 + 1 start at 0, 1 or 2
    starts = {int(corpus.batch(0, step, 4, 15)[0][row, 0]) for step in range(30) for row in range(4)}
    assert starts == {0, 1, 2}


@settings(max_examples=40, deadline=None)
@given(length=st.integers(100, 3000), batch=st.integers(1, 9), seq=st.integers(1, 9))
def test_validation_covers_its_part_once(length, batch, seq):
    corpus = corpus_of(length)
    batches = corpus.validation_batches(batch, seq)
    inputs = torch.cat([x for x, _ in batches]).flatten()
    targets = torch.cat([y for _, y in batches]).flatten()
    first, count = int(corpus.validation.ids[0]), (len(corpus.validation.ids) - 1) // seq * seq
    assert torch.equal(inputs, torch.arange(first, first + count))
    assert torch.equal(targets, inputs + 1)
    assert all(1 <= len(x) <= batch for x, _ in batches)


def test_a_few_validation_windows_are_spread_evenly():
    batches = corpus_of(1000).validation_batches(2, 9, windows=4)  # 11 windows of 9 in 100 tokens
    assert [int(x[row, 0]) for x, _ in batches for row in range(len(x))] == [900, 918, 945, 972]


def test_split_keeps_the_end_for_validation(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(256)) * 4)
    corpus = make_corpus(str(path), ByteTokenizer(), 16)
    assert bytes(torch.cat((corpus.train.ids, corpus.validation.ids)).tolist()) == path.read_bytes()
    assert len(corpus.validation.ids) == int(1024 * 0.05)
    assert len(make_corpus(str(path), ByteTokenizer(), 100).validation.ids) == 101, "at least one sequence"


def test_validation_on_what_is_trained_is_said(tmp_path):
    (tmp_path / "train.txt").write_text("a b c d " * 40)
    (tmp_path / "other.txt").write_text("e f g h " * 40)
    said = []
    for held_out in ("other.txt", "train.txt"):
        assert not said
        files = str(tmp_path / "train.txt"), str(tmp_path / held_out)
        make_corpus(files[0], ByteTokenizer(), 16, said.append, val_data=files[1])
    assert [line.split(":")[0] for line in said] == [
        f"--val-data {tmp_path / 'train.txt'} is trained on as well (--data)"
    ]


def test_unusable_text_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 33)
    with pytest.raises(ValueError, match="no such file: give the path"):
        open_text(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="is a folder without files that end in .txt, .jsonl"):
        make_corpus(str(tmp_path), ByteTokenizer(), 16)
    with pytest.raises(ValueError, match="is empty"):
        open_text(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"33 tokens \(bytes\), and --seq 16 needs at least 34"):
        make_corpus(str(tmp_path / "short"), ByteTokenizer(), 16)
    (tmp_path / "short").write_bytes(b"x" * 34)
    make_corpus(str(tmp_path / "short"), ByteTokenizer(), 16).batch(0, 0, 3, 16)
