"""The command ``spu chat``: try a trained model in the terminal, or in a script through a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

from spu.train.chat import Conversation, Draw, load_trained
from spu.train.run_folder import find_folder

__all__ = ["chat_command"]

_NEW, _HELP = "/new", "Ctrl-C stops an answer, Ctrl-D ends"


def chat_command(which: str, runs: str, draw: Draw, system: str | None) -> None:
    """Answer what is typed, or what comes through a pipe, which is one message.

    Args:
        which: a run, by its name or folder, or a model's folder.
        runs: the folder of all runs.
        draw: how answers are drawn.
        system: the first message of a chat.

    Raises:
        ValueError: no such run or model, or a message without room; the text names it.
    """
    folder = Path(which) if (Path(which) / "config.json").exists() else find_folder(runs, which, "spu chat").path
    talk = Conversation(*load_trained(folder), draw, system)
    if system is not None and not talk.templated:
        raise ValueError(f"--system {system!r}: {folder} has no chat template: leave it out")
    if sys.stdin.isatty():
        _interactive(talk, folder)
    else:
        talk.answer(sys.stdin.read().removesuffix("\n"), _show)
        print()


def _interactive(talk: Conversation, folder: Path) -> None:
    way = f"{_NEW} begins another conversation" if talk.templated else "the model goes on with each text (no template)"
    print(f"{folder}: {way}; {_HELP}")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == _NEW:
            talk.messages = []
        elif text:
            try:
                talk.answer(text, _show)
            except KeyboardInterrupt:
                pass
            except ValueError as error:
                print(error, end="")
            print()


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
