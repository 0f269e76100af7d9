"""Conversations as text, through a tokenizer's chat template, with the assistant's turns marked.

transformers can mark them itself (``return_assistant_tokens_mask``), but only for templates written for it, and it
leaves out the trailing bytes of a character of several tokens. So the places are found here: a conversation is written
up to each answer and up to its end, and both must be how the whole conversation begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spu.common.errors import first_line
from spu.data.example import Example
from spu.data.tokenizer import Tokenizer

__all__ = ["chat_examples", "checked_messages"]

_ASSISTANT = "assistant"
_ROLES = ("system", "developer", "user", _ASSISTANT, "tool")


def checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a row's messages.

    Raises:
        ValueError: no list of messages, each with a role and a text; or none of them is the assistant's.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: messages must be a list of messages, got {_short(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{where}: message {number} has no role: write each as {{"role": "user", "content": "..."}}, '
                f"got {_short(message)}"
            )
        message = {key: part for key, part in message.items() if part is not None}  # tables fill in what is not there
        if message["role"] not in _ROLES:
            raise ValueError(f"{where}: message {number} has the role {message['role']!r}: give {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise ValueError(
                f"{where}: the content of message {number} must be text, got {_short(message.get('content'))}"
            )
        messages.append(message)
    if messages[0]["role"] == _ASSISTANT:
        raise ValueError(f"{where}: the first message is the assistant's: begin with what it answers")
    if all(message["role"] != _ASSISTANT for message in messages):
        raise ValueError(f"{where}: no message is the assistant's, so there is nothing to learn: remove it")
    return messages


def chat_examples(messages: list[dict[str, Any]], tokenizer: Tokenizer, where: str) -> Iterator[Example]:
    """Yield a conversation as one example, whose spans are the assistant's answers with their end-of-turn tokens.

    Some templates write an earlier answer in another way than the last one (without its reasoning, say). Then each
    answer is an example of its own, with the conversation before it, as the model meets it when it answers.

    Raises:
        ValueError: the template refuses the conversation, or how it begins an answer is not how the conversation goes
            on.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == _ASSISTANT]
    until = [index + 1 for index in answers]
    *written, whole = _written([messages[:end] for end in [*until, len(messages)]], tokenizer, where, ask=False)
    told = dict(zip(answers, written, strict=True))
    asked = dict(
        zip(answers, _written([messages[:index] for index in answers], tokenizer, where, ask=True), strict=True)
    )
    for number, index in enumerate(answers, start=1):
        if not told[index].startswith(asked[index]):
            raise ValueError(
                f"{where}: the chat template of {tokenizer.name} begins an answer with {asked[index][-40:]!r}, which "
                f"is not how it writes answer {number}: what the assistant has written cannot be told from the rest; "
                "give another chat_template.jinja"
            )
    kept = [_kept_in(whole, told[index], len(asked[index]), tokenizer) for index in answers]
    if all(end is not None for end in kept):
        ends = [_end_of(told[i][:end], len(asked[i]), messages[i]) for i, end in zip(answers, kept, strict=True)]
        spans = [(len(asked[index]), end) for index, end in zip(answers, ends, strict=True)]
        yield Example(where, whole, tuple(spans), closed=False)
        return
    for index in answers:
        begin = len(asked[index])
        span = (begin, _end_of(told[index], begin, messages[index]))
        yield Example(where, told[index], (span,), closed=False)


def _kept_in(whole: str, told: str, begin: int, tokenizer: Tokenizer) -> int | None:
    """Return how far a conversation up to an answer, which begins at ``begin``, is how the whole one begins.

    All of it; or all but the end-of-text token that some templates put behind every conversation. None where the answer
    itself is written in another way.
    """
    if whole.startswith(told):
        return len(told)
    end = tokenizer.end_text
    if end is None or not told.endswith(end):
        return None
    kept = told.removesuffix(end)
    return len(kept) if len(kept) > begin and whole.startswith(kept) else None


def _written(chats: list[list[dict[str, Any]]], tokenizer: Tokenizer, where: str, *, ask: bool) -> list[str]:
    from jinja2 import TemplateError

    try:
        return tokenizer.render(chats, ask=ask)
    except (TemplateError, TypeError) as error:
        part = "" if not ask else " up to an answer"
        raise ValueError(
            f"{where}: the chat template of {tokenizer.name} refuses the conversation{part}: {first_line(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _end_of(text: str, begin: int, message: dict[str, Any]) -> int:
    """Return where an answer ends that is the end of ``text``: behind its end-of-turn token, without the white space
    that only parts it from the next turn.
    """
    content = str(message.get("content", "")).strip()
    at = text.rfind(content, begin)
    tail = text[at + len(content) :] if at >= 0 else text[begin:]
    return len(text.rstrip()) if tail.strip() else len(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
