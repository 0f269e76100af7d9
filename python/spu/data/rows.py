"""Rows of a table as examples: which columns are read, and what is trained in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spu.data.chat import chat_examples, checked_messages
from spu.data.example import Example
from spu.data.tokenizer import Tokenizer

__all__ = ["FORMS", "Form", "Row", "examples_of", "form_of"]

Row = tuple[str, Mapping[str, Any]]  # where it is, and its values by column


@dataclass(frozen=True)
class Form:
    """Columns that are read together.

    Attributes:
        columns: that every row must have.
        optional: that are read where they are there.
        about: what is trained, for messages.
    """

    columns: tuple[str, ...]
    about: str
    optional: tuple[str, ...] = ()


# The first whose columns are there is taken: a table with messages often has a prompt or a text made from them as well
FORMS = (
    Form(("messages",), "chats, of which the assistant's turns are trained"),
    Form(("prompt", "response"), "prompts and responses, of which the responses are trained"),
    Form(("prompt", "completion"), "prompts and completions, of which the completions are trained"),
    Form(("instruction", "output"), "instructions and outputs, of which the outputs are trained", ("input",)),
    Form(("text",), "texts"),
)


def form_of(columns: Iterable[str], where: str) -> Form:
    """Return how a table with these columns is read.

    Raises:
        ValueError: no way to read it; lists the columns that are there and those that are known.
    """
    there = set(columns)
    for form in FORMS:
        if there.issuperset(form.columns):
            return form
    known = "; ".join(" and ".join(form.columns) for form in FORMS)
    has = ", ".join(sorted(map(str, there))) or "none"
    raise ValueError(f"{where} has the columns {has}: rename them to one of: {known}")


def examples_of(
    rows: Iterator[Row], tokenizer: Tokenizer, path: str, say: Callable[[str], object]
) -> Iterator[Example]:
    """Yield the examples of a table's rows.

    Raises:
        ValueError: rows of several kinds, a value that is no text, what ``chat_examples`` refuses; names the row.
    """
    form: Form | None = None
    for where, row in rows:
        if form is None:
            form = form_of(row, where)
            say(f"reading {path}: {form.about}")
        if missing := [name for name in form.columns if name not in row]:
            has = ", ".join(sorted(map(str, row))) or "none"
            raise ValueError(
                f"{where} has the columns {has}, and the rows before it {' and '.join(form.columns)}: {missing[0]} is "
                "missing; put rows of another kind into a file of their own"
            )
        if form.columns == ("messages",):
            yield from chat_examples(checked_messages(row["messages"], where), tokenizer, where)
        else:
            yield _example(form, row, where)


def _example(form: Form, row: Mapping[str, Any], where: str) -> Example:
    values = [_text(row, name, where) for name in form.columns]
    if len(values) == 1:
        if not values[0]:
            raise ValueError(f"{where}: its text is empty, so there is nothing to learn: remove it")
        return Example(where, values[0])
    prompt, answer = values
    if "input" in form.optional:
        more = _text(row, "input", where) if row.get("input") is not None else ""
        prompt = f"{prompt}\n\n{more}\n\n" if more else f"{prompt}\n\n"
    if not answer:
        raise ValueError(f"{where}: its {form.columns[1]} is empty, so there is nothing to learn: remove it")
    return Example(where, prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, got {type(value).__name__} {str(value)[:40]}")
    return value
