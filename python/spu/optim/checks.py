"""Checks of gradients and settings, made before a step has changed anything, and the constants of a step."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from spu.common.dtypes import STORAGE
from spu.ops.optimizer import PLAIN, on_device

__all__ = ["MODES", "Constants", "check_grad", "check_saved", "check_settings", "control", "step_number"]

# Settings of torch.optim.AdamW that mean another update than this library makes, and those that another class has.
_OTHER_UPDATES = ("amsgrad", "maximize")
MODES = ("capturable", "differentiable")


def control(name: str, value: Tensor | float | None) -> Tensor | None:
    """Return ``found_inf`` or ``grad_scale`` of a step as fp32 [1], or None.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, Tensor) and value == 0:
        return None  # torch's GradScaler.step: the sum of no flags, of an optimizer without gradients
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"step: {name} must be a tensor, float32 of one element, got {value!r}")
    if value is not None and (value.dtype != torch.float32 or value.numel() != 1):
        raise TypeError(f"step: {name} must be float32 of one element, got {value.dtype} {tuple(value.shape)}")
    return None if value is None else value.detach().reshape(1)


def check_grad(param: Tensor, *, bf16: bool = False) -> Tensor:
    """Return the parameter's gradient: dense and fp32, in a bf16, fp64 or complex parameter's own dtype too.

    Args:
        param: has a gradient.
        bf16: it may be in bf16 whatever the parameter's dtype.

    Raises:
        TypeError: it is not; the message says what to do.
    """
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient ({grad.layout}), which no optimizer "
            "here steps: build its layer with dense gradients (nn.Embedding(..., sparse=False)), or give this "
            "parameter to torch.optim.SparseAdam"
        )
    if param.dtype in PLAIN:
        if grad.dtype != param.dtype:
            raise TypeError(
                f"a {param.dtype} parameter of shape {tuple(param.shape)} has a {grad.dtype} gradient: it is stepped "
                "with a gradient of its own dtype"
            )
    elif param.dtype not in STORAGE:
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is {param.dtype}: optimizers here step float16, bfloat16, "
            "float32, float64 and complex parameters"
        )
    elif grad.dtype != torch.float32 and not (grad.dtype == torch.bfloat16 and (bf16 or param.dtype == torch.bfloat16)):
        raise TypeError(
            f"a {param.dtype} parameter of shape {tuple(param.shape)} has a {grad.dtype} gradient, but optimizers here "
            "take fp32 ones: scale the loss with spu.GradScaler, which makes them, or set param.grad_dtype = "
            "torch.float32 before the backward"
        )
    return grad


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError where torch.optim.AdamW's settings ask for an update that ``spu.optim.AdamW`` does not have."""
    for name in (*_OTHER_UPDATES, *MODES):
        if settings.get(name):
            raise ValueError(f"{name}={settings[name]} is not in spu.optim.AdamW: use torch.optim.AdamW for it")
    lr = settings.get("lr")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got one of shape {tuple(lr.shape)}")


def check_numbers(**settings: Any) -> None:
    """Raise TypeError for a setting that is neither a number nor a tensor."""
    for name, value in settings.items():
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name} is {value!r}: give a number")


def check_saved(saved: Any) -> None:
    """Raise ValueError for what is no optimizer's state, or one whose settings mean another update than that of
    ``spu.optim.AdamW``.
    """
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        has = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"this is no optimizer's state ({has or 'it is empty'}): give what its state_dict() returned")
    for group in saved["param_groups"]:
        if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is another optimizer's than AdamW's")
        for name in _OTHER_UPDATES:
            if group.get(name):
                raise ValueError(f"the state was saved with {name}=True, which this AdamW does not have")
        if group.get("decoupled_weight_decay") is False:
            raise ValueError("the state is torch.optim.Adam's, whose weight decay is not decoupled as AdamW's is")


def step_number(value: Any, param: Tensor) -> Tensor:
    """Return a state's ``step`` as fp32 [1]. Torch before 1.12, and converters, kept a number."""
    if isinstance(value, Tensor):
        return value.detach().to(device=param.device, dtype=torch.float32).reshape(1)
    return torch.full((1,), float(value), dtype=torch.float32, device=param.device)


class Constants:
    """fp32 [1] constants, made once per device."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, float], Tensor] = {}

    def unless(self, given: Tensor | None, default: float, device: torch.device) -> Tensor:
        """Return the given value on a device; the constant where it is None."""
        if given is not None:
            return on_device(given, device)
        if (device, default) not in self._made:
            self._made[device, default] = torch.full((1,), default, dtype=torch.float32, device=device)
        return self._made[device, default]
