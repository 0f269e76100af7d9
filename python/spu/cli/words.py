"""Messages of the library in the words of the command line."""

from __future__ import annotations

import re

__all__ = ["as_options"]

_NAMES = "accumulate|activations|grads|microbatches|precision|recompute|residency|schedule|state|transfer"
_KEYWORD = re.compile(rf'\b({_NAMES})=(?:"(\w+)"|(True|False)|(\d+))')


def as_options(text: str) -> str:
    """Return a message with settings as options: ``grads="bf16"`` is ``--grads bf16``."""

    def option(found: re.Match[str]) -> str:
        name, word, switch, number = found.groups()
        return f"--{name} {word or number or ('on' if switch == 'True' else 'off')}"

    return _KEYWORD.sub(option, text)
