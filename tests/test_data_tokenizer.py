"""Tokenizers: bytes, and the one beside a model."""

from __future__ import annotations

import pytest

from spu.data.example import Example
from spu.data.tokenizer import ByteTokenizer, FileTokenizer, make_tokenizer


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


EXAMPLES = [
    Example("F", "the fox"),
    Example("F", "Q: hi 😀\nI am fine 한", ((8, 19),)),
    Example("F", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n", ((52, 66),), closed=False),
]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_tokenizer_without_offsets_marks_the_same_tokens(tmp_path, kind):
    pytest.importorskip("transformers")
    from tiny_models import tokenizer_folder

    tokenizer = FileTokenizer(tokenizer_folder(tmp_path, kind=kind))
    expected = tokenizer.encode_examples(EXAMPLES)
    vars(tokenizer)["_fast"] = None
    found = tokenizer.encode_examples(EXAMPLES)
    for one, other in zip(found, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.trained is None) == (other.trained is None)
        assert one.trained is None or one.trained.tolist() == other.trained.tolist()
    learnt = [tokenizer.decode(one.ids[one.trained].tolist()) for one in expected[1:]]
    assert learnt == ["I am fine 한<|end|>", "fine<|im_end|>"]


def test_a_token_across_the_end_of_a_prompt_is_none_of_the_tokens(tmp_path):
    """A prompt that ends in a space: the answer's first token would be one with it, which no prompt can end in."""
    pytest.importorskip("transformers")
    from tiny_models import tokenizer_folder

    tokenizer = FileTokenizer(tokenizer_folder(tmp_path))
    (tokens,) = tokenizer.encode_examples([Example("F", "the quick brown", ((4, 15),))])
    assert tokenizer.decode(tokens.ids[tokens.trained].tolist()) == "quick brown<|end|>"
    assert tokenizer.decode(tokens.ids[~tokens.trained].tolist()) == "the "


def test_texts_begin_and_end_as_the_tokenizer_begins_and_ends_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tiny_models import tokenizer_folder
    from tokenizers.processors import TemplateProcessing

    folder = tokenizer_folder(tmp_path)
    inner = FileTokenizer(folder).inner.backend_tokenizer
    begin = inner.token_to_id("<|im_start|>")
    inner.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)])
    more = {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **more).save_pretrained(folder)
    tokenizer = FileTokenizer(folder)
    first, second, chat = tokenizer.encode_examples(EXAMPLES)
    assert [tokenizer.decode([tokens.ids[0]]) for tokens in (first, second)] == ["<|im_start|>"] * 2
    assert [tokenizer.decode([tokens.ids[-1]]) for tokens in (first, second)] == ["<|end|>"] * 2
    assert second.trained is not None
    assert not second.trained[0]
    assert second.trained[-1]
    assert tokenizer.decode(chat.ids.tolist()) == EXAMPLES[2].text, "a chat template writes its own"
