"""spu: train PyTorch models that do not fit the card you own, exactly and fast.

Every part can be imported alone: ``spu.ops`` (fused linear layers whose backward knows the loss scale, wire codecs,
AdamW over main gradients), ``spu.precision`` (loss scaler, main gradients), ``spu.nn`` (drop-in modules),
``spu.schedules`` and ``spu.plan`` (pipeline schedules, simulator, placement), ``spu.checkpoint``, and the trainer over
all of them, :class:`spu.ModelParallelTrainer`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spu.devices.manager import Device as Device
    from spu.devices.manager import DeviceManager as DeviceManager
    from spu.engine.engine import StageError as StageError
    from spu.engine.result import StepResult as StepResult
    from spu.memory.spill import spilled as spilled
    from spu.model.randomness import LayerRandomness as LayerRandomness
    from spu.nn import accelerate as accelerate
    from spu.nn import restore as restore
    from spu.ops import backends as backends
    from spu.ops import same_weights as same_weights
    from spu.ops import use_backend as use_backend
    from spu.precision import GradScaler as GradScaler
    from spu.precision import LossScaler as LossScaler
    from spu.precision import MainGrads as MainGrads
    from spu.trainer.adapter import save_adapter as save_adapter
    from spu.trainer.trainer import ModelParallelTrainer as ModelParallelTrainer

# Public names and where they live. Loaded at first use, so that `import spu` costs little and one broken optional
# dependency does not take the rest of the library with it.
_EXPORTS = {
    "Device": "spu.devices.manager",
    "DeviceManager": "spu.devices.manager",
    "GradScaler": "spu.precision",
    "LayerRandomness": "spu.model.randomness",
    "LossScaler": "spu.precision",
    "MainGrads": "spu.precision",
    "ModelParallelTrainer": "spu.trainer.trainer",
    "StageError": "spu.engine.engine",
    "StepResult": "spu.engine.result",
    "accelerate": "spu.nn",
    "backends": "spu.ops",
    "restore": "spu.nn",
    "same_weights": "spu.ops",
    "save_adapter": "spu.trainer.adapter",
    "spilled": "spu.memory.spill",
    "use_backend": "spu.ops",
}
_SUBMODULES = {
    "checkpoint",
    "cli",
    "cost",
    "data",
    "devices",
    "engine",
    "integrations",
    "kernels",
    "memory",
    "model",
    "nn",
    "ops",
    "optim",
    "plan",
    "precision",
    "schedules",
    "settings",
    "skips",
    "train",
    "trainer",
    "transfer",
    "tune",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"spu.{name}")
    raise AttributeError(f"module 'spu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
