"""Chats: what the assistant wrote, its end-of-turn token included, is trained and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_models import CHATML, chat, tokenizer_folder

pytest.importorskip("transformers")

from spu.data.chat import chat_examples, checked_messages
from spu.data.tokenizer import ByteTokenizer, FileTokenizer

Make = Callable[..., FileTokenizer]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def made(template: str | None = CHATML, kind: str = "byte-level") -> FileTokenizer:
        return FileTokenizer(tokenizer_folder(tmp_path_factory.mktemp("t"), template=template, kind=kind))

    return made


def trained_of(tokenizer: FileTokenizer, row: dict) -> list[list[str]]:
    """Return the trained text of each example, a run of trained tokens each."""
    result = []
    examples = list(chat_examples(checked_messages(row["messages"], "F"), tokenizer, "F"))
    for example, tokens in zip(examples, tokenizer.encode_examples(examples), strict=True):
        whole = tokenizer.decode(tokens.ids.tolist())  # a space more behind special tokens, as Llama 2's
        assert whole.replace(" ", "") == example.text.replace(" ", "")
        runs, run = [], []
        for token, trained in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
            if trained:
                run.append(token)
            elif run:
                runs.append(tokenizer.decode(run))
                run = []
        result.append([*runs, *([tokenizer.decode(run)] if run else [])])
    return result


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_each_answer_is_trained_with_its_end_of_turn(make: Make, kind: str) -> None:
    tokenizer = make(kind=kind)
    row = chat("How are you?", "I am fine", "the dog?", "the fox 😀", system="You are a fox")
    assert trained_of(tokenizer, row) == [["I am fine<|im_end|>", "the fox 😀<|im_end|>"]]
    assert trained_of(tokenizer, chat("hi", "\nline \n", "more")) == [["\nline \n<|im_end|>"]], "white space of its own"


def test_all_bytes_of_a_character_are_trained_where_nothing_follows_it(make: Make) -> None:
    """transformers' own mask leaves out the last ones."""
    bare = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert trained_of(make(bare), chat("hi", "한😀")) == [["한😀"]]


def test_a_template_that_rewrites_earlier_answers_gives_an_example_for_each(make: Make) -> None:
    """As Qwen3's, which drops the reasoning of all answers but the last."""
    thinking = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    )
    row = chat("hi", "<think>a</think>one", "more", "<think>b</think>two")
    assert trained_of(make(thinking), row) == [["<think>a</think>one<|im_end|>"], ["<think>b</think>two<|im_end|>"]]


def test_what_a_template_puts_behind_every_conversation_is_no_part_of_earlier_answers(make: Make) -> None:
    """As Phi 3's, which ends in an end-of-text token."""
    ended = CHATML.replace("{% endif %}", "{% else %}<|end|>{% endif %}")
    row = chat("hi", "one", "more", "two")
    assert trained_of(make(ended), row) == [["one<|im_end|>", "two<|im_end|>\n<|end|>"]]


def test_a_template_whose_answers_do_not_begin_as_asked_is_refused(make: Make) -> None:
    odd = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>bot\n")
    with pytest.raises(ValueError, match=r"F: the chat template of tokenizer of .* begins an answer with .*bot"):
        trained_of(make(odd), chat("hi", "one"))


def test_what_a_template_refuses_is_refused_with_the_line(make: Make) -> None:
    strict = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"F: the chat template .* refuses the conversation.*: .*roles must alternate"):
        trained_of(make(strict), chat("hi", "one", system="s"))
    with pytest.raises(ValueError, match=r"F: a chat needs a chat template, and tokenizer of .* has none"):
        trained_of(make(None), chat("hi", "one"))
    with pytest.raises(ValueError, match=r"F: a chat needs a tokenizer with a chat template"):
        list(chat_examples(chat("hi", "one")["messages"], ByteTokenizer(), "F"))


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("hello", "messages must be a list of messages, got 'hello'"),
        ([], "messages must be a list"),
        ([{"content": "hi"}], "message 1 has no role"),
        (
            [{"role": "user", "content": "hi"}, {"role": "gpt", "content": "x"}],
            "message 2 has the role 'gpt': give system",
        ),
        ([{"role": "user", "content": ["hi"]}], "the content of message 1 must be text"),
        ([{"role": "assistant", "content": "hi"}], "the first message is the assistant's"),
        ([{"role": "user", "content": "hi"}], "no message is the assistant's, so there is nothing to learn"),
    ],
)
def test_rows_that_are_no_chat_are_refused(messages: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"F, line 3: {what}"):
        checked_messages(messages, "F, line 3")
