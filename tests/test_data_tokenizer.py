"""Tokenizers: bytes, and the one beside a model."""

from __future__ import annotations

import pytest

from spu.data.tokenizer import ByteTokenizer, make_tokenizer


def test_bytes_round_trip():
    text = "naïve Δ".encode()
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text)
    assert ByteTokenizer().decode(ids.tolist()) == "naïve Δ"
    assert ByteTokenizer().decode([104, 105, 300]) == "hi"


def test_a_vocabulary_that_cannot_hold_bytes_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 100 cannot hold bytes"):
        make_tokenizer(None, 100, weights=False)


def test_a_tokenizer_beside_the_config_is_used(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "to": 1, "be": 2, "or": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = make_tokenizer(str(tmp_path), 8, weights=False)
    assert tokenizer.encode(b"to be or not to be").tolist() == [1, 2, 3, 0, 1, 2]
    assert tokenizer.decode([1, 2]) == "to be"
    (saved := tmp_path / "saved").mkdir()
    tokenizer.save(saved)
    assert make_tokenizer(str(saved), 8, weights=True).decode([1, 2]) == "to be"


def test_weights_of_another_vocabulary_are_not_taken_for_bytes(tmp_path):
    assert make_tokenizer(str(tmp_path), 300, weights=False).name == "bytes", "a config alone"
    with pytest.raises(
        ValueError, match=r"weights for 300 tokens, and no tokenizer beside them: put its tokenizer.json"
    ):
        make_tokenizer(str(tmp_path), 300, weights=True)
    ByteTokenizer().save(tmp_path)
    assert make_tokenizer(str(tmp_path), 300, weights=True).name == "bytes"
