"""spu under the names of other libraries: their users' scripts stay as they are.

``SpuTrainer`` is a ``transformers.Trainer``. It is imported at first use: transformers is an optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spu.integrations.hf_trainer import SpuTrainer as SpuTrainer

__all__ = ["SpuTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spu.integrations.hf_trainer"), name)
    raise AttributeError(f"module 'spu.integrations' has no attribute {name!r}")
