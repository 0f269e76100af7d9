"""InternLM2's tokenizer gives the ids of the sentencepiece package, and writes the files that it was read from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")

from spu.data.sentencepiece import read_sentencepieces  # noqa: E402
from spu.data.tokenizer import FileTokenizer, make_tokenizer  # noqa: E402

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump, and the 12 others",
    "def f(x):\n    return x + 1",
    "die größte Übung 中文分词 测试",
]
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\nlines\n\n",
    "unseen: \N{SNOWMAN} \N{GRINNING FACE} é",
    "the the thethethe",
    "ﬁ ① full-width: ＡＢＣ",
    "a" * 300,
]
RESERVED = [f"[UNUSED_TOKEN_{n}]" for n in range(4)]


def make_folder(folder: Path, *, model_type: str = "bpe", **options: object) -> Path:
    """A folder as InternLM2's, with a small model that the sentencepiece package has trained."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("\n".join(SENTENCES * 4))
    settings = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=model_type,
        vocab_size=400,
        hard_vocab_limit=False,
        user_defined_symbols=RESERVED,
        minloglevel=2,
        **settings | options,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "internlm2"}))
    first = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).piece_to_id(RESERVED[0])
    added = {str(first): {"content": "<|im_start|>", "special": True}}
    added[str(first + 1)] = {"content": "<|im_end|>", "special": True}
    config = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"}],
    ids=["as published", "no space in front", "normalised"],
)
def test_ids_are_sentencepieces(tmp_path: Path, options: dict[str, object]) -> None:
    ours = FileTokenizer(make_folder(tmp_path, **options))
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        if "\t" in text and options.get("normalization_rule_name"):
            continue  # its characters become spaces, which are stripped before they do here
        assert ours.encode(text.encode()).tolist() == theirs.encode(text), repr(text)
        if not options.get("normalization_rule_name"):
            assert ours.decode(theirs.encode(text)) == text, repr(text)


def test_marks_of_a_chat_are_tokens_in_their_reserved_places(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(make_folder(tmp_path, add_dummy_prefix=False))
    inner = tokenizer._tokenizer
    pieces = [piece.text for piece in read_sentencepieces(tmp_path / "tokenizer.model").pieces]
    assert inner.convert_tokens_to_ids("<|im_start|>") == pieces.index(RESERVED[0])
    assert len(inner) == len(pieces)
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    text = inner.apply_chat_template(messages, tokenize=False)
    assert text == "<s><|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\njumps<|im_end|>\n"
    ids = tokenizer.encode(text.encode()).tolist()
    start, end = pieces.index(RESERVED[0]), pieces.index(RESERVED[1])
    assert ids[:2] == [1, start]
    assert (ids.count(start), ids.count(end)) == (2, 2)
    assert tokenizer.decode(ids) == text
    assert inner("a")["input_ids"][0] == 1, "a text begins with <s>, as with InternLM2's own class"


def test_it_is_saved_as_the_files_it_was_read_from(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(make_folder(tmp_path / "source"))
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    names = ["tokenizer.model", "tokenizer_config.json"]
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_damaged_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path)
    model, config = tmp_path / "tokenizer.model", tmp_path / "tokenizer_config.json"
    whole, values = model.read_bytes(), config.read_text()

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=said):
            make_tokenizer(str(tmp_path), 400, weights=True)

    model.write_bytes(whole[: len(whole) // 2 + 1])
    refused(r"tokenizer.model is (damaged|no byte-pair)")
    model.write_bytes(b"")
    refused(r"tokenizer.model is no sentencepiece model: it has no tokens")
    model.write_bytes(whole)
    config.write_text("{")
    refused(r"tokenizer_config.json is not JSON")
    config.write_text(values.replace('"added_tokens_decoder": {', '"added_tokens_decoder": {"9999": {"content": "x"},'))
    refused(r"added token '9999' \('x'\) is none of the \d+ tokens of tokenizer.model")
    config.write_text(values)
    make_folder(tmp_path, model_type="unigram")
    refused(r"tokenizer.model is no byte-pair encoding")
