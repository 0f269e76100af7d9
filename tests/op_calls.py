"""A mode that tells which ops run, in backwards too."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Ops"]


class Ops(TorchDispatchMode):
    """Keeps the ops' names: ``full`` ("aten::add"), and ``names`` without what is before them."""

    def __init__(self) -> None:
        super().__init__()
        self.full: list[str] = []

    @property
    def names(self) -> list[str]:
        return [name.split("::")[1] for name in self.full]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.full.append(func._schema.name)
        return func(*args, **(kwargs or {}))
