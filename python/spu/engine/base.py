"""The frozen weights that a checkpoint of adapters leaves out: others are not taken for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from spu.checkpoint.writing import CheckpointError

__all__ = ["base_record", "check_base"]

_SAMPLED = 64  # values of each tensor: all of them would be read from a disk at every save


def base_record(frozen: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what is kept of frozen weights, as JSON: a hash of names and shapes, one of some values, and the dtypes.

    Args:
        frozen: by name in the model.
    """
    form, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(frozen.items()):
        form.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        some = flat[torch.arange(0, flat.numel(), max(1, flat.numel() // _SAMPLED), device=flat.device)]
        values.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    dtypes = sorted({str(tensor.dtype) for tensor in frozen.values()})
    return {"tensors": len(frozen), "form": form.hexdigest(), "values": values.hexdigest(), "dtypes": dtypes}


def check_base(saved: Mapping[str, Any] | None, frozen: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError if these are not the frozen weights that a checkpoint was saved with.

    Values are compared where the precision is the same.
    """
    if saved is None:
        return
    here = base_record(frozen)
    if here["form"] != saved["form"]:
        raise CheckpointError(
            f"the checkpoint is of another model: it was trained beside {saved['tensors']} frozen tensors, and this "
            f"one has {here['tensors']}, or others; build the model that it was saved from"
        )
    if here["dtypes"] == saved["dtypes"] and here["values"] != saved["values"]:
        raise CheckpointError(
            "the frozen weights are not those that the checkpoint's adapters were trained on: load the same base model"
        )
