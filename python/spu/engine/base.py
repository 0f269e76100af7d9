"""The frozen weights that a checkpoint of adapters leaves out: others are not taken for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from spu.checkpoint.writing import CheckpointError
from spu.common.absent import is_absent
from spu.common.raw import bytes_of, some_of

__all__ = ["Sample", "base_record", "check_base", "sampled"]


class Sample(NamedTuple):
    """What is kept of a frozen tensor: shape, dtype, and the bytes of some of its values."""

    shape: tuple[int, ...]
    dtype: str
    values: bytes


def sampled(frozen: Mapping[str, torch.Tensor]) -> dict[str, Sample]:
    """Return what is kept of frozen weights, by name in the model; names in order."""
    found = {}
    for name, tensor in sorted(frozen.items()):
        if is_absent(tensor):
            found[name] = Sample(tuple(tensor.shape), str(tensor.dtype), b"")
            continue
        values = bytes_of(some_of(tensor).cpu()).numpy().tobytes()
        found[name] = Sample(tuple(tensor.shape), str(tensor.dtype), values)
    return found


def base_record(frozen: Mapping[str, Sample]) -> dict[str, Any]:
    """Return what is kept of frozen weights, as JSON: a hash of names and shapes, one of some values, and the dtypes.

    Args:
        frozen: by name in the model, as :func:`sampled` returns them.
    """
    form, values = hashlib.sha256(), hashlib.sha256()
    for name, sample in sorted(frozen.items()):
        form.update(f"{name} {sample.shape}\n".encode())
        values.update(sample.values)
    dtypes = sorted({sample.dtype for sample in frozen.values()})
    return {"tensors": len(frozen), "form": form.hexdigest(), "values": values.hexdigest(), "dtypes": dtypes}


def check_base(saved: Mapping[str, Any] | None, frozen: Mapping[str, Sample]) -> None:
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
