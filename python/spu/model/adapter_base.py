"""The frozen weights that adapters were trained beside: hashes of some values lie with them, and others are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.absent import is_absent
from spu.common.files import write_json
from spu.common.raw import bytes_of, some_of

__all__ = ["BASE", "TrainedBeside", "base_values", "read_base", "write_base"]

BASE = "spu_base.json"  # beside the files of peft, which reads its own alone
_WRAPPED = ("base_layer", "original_module")  # what peft calls a module that it has put into one of its own
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def base_values(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what is kept of a ``PeftModel``'s frozen weights, by their names in the model without adapters, as JSON.

    Weights of other processes, and what is no floating-point number, are left out.
    """
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or is_absent(parameter) or str(parameter.dtype) not in _DTYPES:
            continue
        found[_in_base(name)] = {
            "dtype": str(parameter.dtype),
            "shape": list(parameter.shape),
            "values": _hash(some_of(parameter)),
        }
    return found


def write_base(folder: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Write :func:`base_values` beside an adapter."""
    write_json(folder / BASE, {"frozen": dict(sorted(values.items()))})


def read_base(folder: Path) -> TrainedBeside | None:
    """Return what an adapter was trained beside; None where nobody has written it down.

    Raises:
        ValueError: the file is damaged.
    """
    place = folder / BASE
    if not place.is_file():
        return None
    try:
        frozen = json.loads(place.read_text(encoding="utf-8"))["frozen"]
        known = {name: (_DTYPES[own["dtype"]], tuple(own["shape"]), str(own["values"])) for name, own in frozen.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} cannot be read ({error!r}): copy the adapter again, or remove this file") from None
    return TrainedBeside(folder, known)


class TrainedBeside:
    """The frozen weights that an adapter was trained beside."""

    def __init__(self, folder: Path, known: Mapping[str, tuple[torch.dtype, tuple[int, ...], str]]) -> None:
        self._folder, self._known = folder, known

    def check(self, name: str, tensor: torch.Tensor, source: str, *, rounded: bool = False) -> None:
        """Raise ValueError if the adapter was trained beside another tensor of this name.

        Values are compared in the precision of the training. A name that is not known is not compared.

        Args:
            name: in the model without adapters.
            tensor: its values.
            source: where they are from, for the error.
            rounded: they have fewer bits than where they are from; compared where the training had the same.
        """
        if name not in self._known:
            return
        dtype, shape, values = self._known[name]
        if tensor.shape == shape and rounded and tensor.dtype != dtype:
            return
        if tensor.shape != shape or _hash(some_of(tensor).to(dtype)) != values:
            raise ValueError(
                f"{self._folder} was trained beside other weights than those of {source}: {name} differs. Give the "
                f"model that it was trained on; without {BASE} nothing is compared"
            )

    def check_model(self, model: nn.Module, source: str, *, rounded: bool = False) -> None:
        """Check all weights of a ``PeftModel``, as :meth:`check`."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.check(_in_base(name), parameter, source, rounded=rounded)


def _in_base(name: str) -> str:
    """Return the name in the model of what peft has put a name of its own on."""
    path = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in path if part not in _WRAPPED)


def _hash(some: torch.Tensor) -> str:
    return hashlib.sha256(bytes_of(some.cpu()).numpy().tobytes()).hexdigest()[:16]
