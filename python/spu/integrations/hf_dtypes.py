"""The dtypes that a ``transformers.Trainer`` leaves weights in, and how `SpuTrainer` leaves them in the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from spu.common.dtypes import DTYPES, NAMES
from spu.precision.dtypes import state_dtypes

__all__ = ["GivenDtypes", "chosen_precision"]

_MASTERS = "fp32 masters and a loss scale"


def chosen_precision(model: nn.Module, *, bf16: bool, fp16: bool) -> str:
    """Return the precision in which a ``Trainer`` with these arguments computes: theirs, else that of most weights.

    Raises:
        ValueError: fp64 weights; fp16 weights without an argument.
    """
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:  # fp8 is how a quantised weight is stored
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if torch.float64 in counts:
        raise ValueError(
            "the model has fp64 weights, which transformers.Trainer trains in fp64; the engine's widest precision is "
            "fp32: call model.float() first, or use transformers.Trainer"
        )
    if bf16 or fp16:
        return "bf16" if bf16 else "fp16"
    most = max(counts, key=counts.__getitem__, default=torch.float32)
    if most == torch.float16:
        raise ValueError(
            "the model has fp16 weights and the arguments name no precision: transformers.Trainer would train them "
            f"without a loss scale, and with an epsilon that is 0 in fp16. Give fp16=True ({_MASTERS}; the model stays "
            "fp16), or call model.float() first"
        )
    return NAMES.get(most, "fp32")


class GivenDtypes:
    """The dtypes of a model's weights and buffers before it is trained in a precision, and what that would round.

    A frozen weight has no master: where the precision would round it, its value is kept here, on the CPU.

    Args:
        model: as it was given.
        precision: of the training.

    Attributes:
        config: the dtype that ``save_pretrained`` would write into config.json.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        becomes = state_dtypes([model], DTYPES[precision])
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._dtypes = {name: value.dtype for name, value in (parameters | _buffers(model)).items()}
        self._kept: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}
        for name, parameter in parameters.items():
            dtype = becomes.get(id(parameter), parameter.dtype)
            if not parameter.requires_grad and _rounds(parameter, dtype):
                own = copies.setdefault(id(parameter), parameter.detach().to("cpu", copy=True))
                self._kept[name] = own
        self.config = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")

    def state(self, exact: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state by name, each tensor in the dtype that it was given in; tied ones stay one."""
        made: dict[int, torch.Tensor] = {}
        state = dict(exact)
        for name, value in exact.items():
            if name in self._kept:
                state[name] = self._kept[name]
            elif name in self._dtypes and isinstance(value, torch.Tensor):
                state[name] = made.setdefault(id(value), value.to(self._dtypes[name]))
        return state

    def give_back(self, model: nn.Module, exact: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put a state, of which :meth:`state` was made, into the model, and all of it on a device."""
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.data = exact[name].to(device)
        for name, buffer in _buffers(model).items():
            buffer.data = buffer.data.to(device, self._dtypes.get(name, buffer.dtype))


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def _rounds(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a conversion changes a value; piece by piece, so that no copy of all is made."""
    if dtype == value.dtype or not value.is_floating_point():
        return False
    pieces: Iterable[torch.Tensor] = value.detach().reshape(-1).split(1 << 22)
    return any(not torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in pieces)
