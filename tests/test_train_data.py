"""Text, tokens, batches: what every step trains on is a function of (seed, step)."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from spu.train.data import Corpus, make_corpus, read_text  # noqa: E402
from spu.train.model import ByteTokenizer, load_config, make_model, make_tokenizer  # noqa: E402


def corpus_of(length: int) -> Corpus:
    ids = torch.arange(length, dtype=torch.int32)
    return Corpus("numbers", "0", ids[: length * 9 // 10], ids[length * 9 // 10 :])


def test_default_text_is_the_language_reference():
    name, text = read_text(None)
    assert name == "pydoc_data.topics"
    assert len(text) > 300_000
    assert text == read_text(None)[1]
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
    first, count = int(corpus.validation[0]), (len(corpus.validation) - 1) // seq * seq
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
    assert bytes(torch.cat((corpus.train, corpus.validation)).tolist()) == path.read_bytes()
    assert len(corpus.validation) == int(1024 * 0.05)
    assert len(make_corpus(str(path), ByteTokenizer(), 100).validation) == 101, "at least one sequence"


def test_unusable_text_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 33)
    with pytest.raises(ValueError, match="no such file: give the path"):
        read_text(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="is a folder: give one text file"):
        read_text(str(tmp_path))
    with pytest.raises(ValueError, match="is empty"):
        read_text(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"33 tokens \(bytes\), and --seq 16 needs at least 34"):
        make_corpus(str(tmp_path / "short"), ByteTokenizer(), 16)
    (tmp_path / "short").write_bytes(b"x" * 34)
    make_corpus(str(tmp_path / "short"), ByteTokenizer(), 16).batch(0, 0, 3, 16)


def test_bytes_round_trip():
    text = "naïve Δ".encode()
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text)
    assert ByteTokenizer().decode(ids.tolist()) == "naïve Δ"
    assert ByteTokenizer().decode([104, 105, 300]) == "hi"


def test_default_model_is_a_function_of_the_seed():
    first, again, other = make_model(None, 1), make_model(None, 1), make_model(None, 2)
    assert sum(p.numel() for p in first.parameters()) >= 3_000_000
    assert first.config.num_hidden_layers >= 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_models_that_cannot_be_used_are_refused(tmp_path):
    def config_file(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, **changes}))
        return str(path)

    with pytest.raises(ValueError, match=r"no such file or folder with a config.json"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="model_type 'newthing': it needs code of its own, which is not run"):
        load_config(config_file(model_type="newthing", auto_map={"AutoModel": "evil.Model"}))
    with pytest.raises(ValueError, match="model_type 'newthing': transformers does not know it"):
        load_config(config_file(model_type="newthing"))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_config(str(tmp_path))
    with pytest.raises(ValueError, match="a vocabulary of 100 cannot hold bytes"):
        make_tokenizer(None, load_config(config_file(vocab_size=100)))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is pickled and not read; convert the weights to safetensors"
    ):
        make_model(str(tmp_path), 0)


def test_weights_come_from_safetensors_and_must_be_whole(tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model = make_model(str(tmp_path), 3)
    model.save_pretrained(tmp_path / "saved")
    loaded = make_model(str(tmp_path / "saved"), 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys in its safetensors: model.norm.weight"):
        make_model(str(tmp_path / "saved"), 4)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        make_model(str(tmp_path / "saved"), 4)


def test_a_tokenizer_beside_the_config_is_used(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "to": 1, "be": 2, "or": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "vocab_size": 8}))
    tokenizer = make_tokenizer(str(tmp_path), load_config(str(tmp_path)))
    assert tokenizer.encode(b"to be or not to be").tolist() == [1, 2, 3, 0, 1, 2]
    assert tokenizer.decode([1, 2]) == "to be"
    (saved := tmp_path / "saved").mkdir()
    tokenizer.save(saved)
    assert make_tokenizer(str(saved), load_config(str(tmp_path))).decode([1, 2]) == "to be"


def test_weights_of_another_vocabulary_are_not_taken_for_bytes(tmp_path):
    config = {**TINY, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_tokenizer(str(tmp_path), load_config(str(tmp_path))).name == "bytes", "a config alone"
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"weights for 300 tokens, and no tokenizer beside them: put its tokenizer.json"
    ):
        make_tokenizer(str(tmp_path), load_config(str(tmp_path)))
    ByteTokenizer().save(tmp_path)
    assert make_tokenizer(str(tmp_path), load_config(str(tmp_path))).name == "bytes"
