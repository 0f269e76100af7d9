"""``MasterOptimizer``: any torch optimizer on fp32 masters of 16-bit parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spu.common.dtypes import HALVES
from spu.ops.optimizer import on_device
from spu.ops.reference.optimizer import follow
from spu.optim.checks import check_grad, control

__all__ = ["MasterOptimizer"]


class MasterOptimizer:
    """Any torch optimizer, run on fp32 parameters and on the fp32 masters of 16-bit ones.

    A 16-bit weight that somebody changes between steps is taken into its master, as ``AdamW`` does.

    Args:
        factory: makes the optimizer from a list of fp32 tensors, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        params: fp32, fp16 or bf16 parameters.
        masters: exact fp32 values of the 16-bit parameters (None where there is none), in the order of ``params``;
            default: the parameters' own values. They are copied.
    """

    def __init__(
        self,
        factory: Callable[[list[Tensor]], torch.optim.Optimizer],
        params: Iterable[nn.Parameter],
        masters: Sequence[Tensor | None] | None = None,
    ) -> None:
        if not callable(factory):
            raise TypeError(
                f"factory is a {type(factory).__name__}: give what makes an optimizer of a list of tensors, such as "
                "lambda tensors: torch.optim.SGD(tensors, lr=0.1)"
            )
        self._params = list(params)
        given = [None] * len(self._params) if masters is None else list(masters)
        if len(given) != len(self._params):
            raise ValueError(f"{len(given)} masters for {len(self._params)} parameters: give one each (or None)")
        self._targets = [self._target(param, master) for param, master in zip(self._params, given, strict=True)]
        self.optimizer = factory(self._targets)

    @staticmethod
    def _target(param: nn.Parameter, master: Tensor | None) -> Tensor:
        if param.dtype not in HALVES:
            return param
        value = param if master is None else master
        if value.shape != param.shape:
            raise ValueError(f"the master has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")
        value = value.detach().to(device=param.device, dtype=torch.float32, copy=True)
        target = nn.Parameter(value.contiguous())  # as main gradients are
        if master is not None:
            param.data.copy_(target.data)
        return target

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups (learning rates are set here)."""
        return self.optimizer.param_groups

    def tensors(self) -> list[Tensor]:
        """Return what is kept beside the parameters: their masters, and the inner optimizer's state."""
        own = [target for param, target in zip(self._params, self._targets, strict=True) if target is not param]
        states = self.optimizer.state.values()
        return own + [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def masters(self) -> list[Tensor | None]:
        """Return the fp32 master of each parameter, None for those that are fp32 themselves."""
        pairs = zip(self._params, self._targets, strict=True)
        return [None if target is param else self._followed(param, target) for param, target in pairs]

    def target(self, param: nn.Parameter) -> Tensor:
        """Return the fp32 tensor that the inner optimizer updates for a parameter: its master, or the parameter itself.

        Itself also where it is none of this optimizer's: one that was frozen when the optimizer was made.
        """
        return next((target for own, target in zip(self._params, self._targets, strict=True) if own is param), param)

    def master(self, param: nn.Parameter) -> Tensor:
        """Like ``target``, without its graph."""
        return self._followed(param, self.target(param))

    @staticmethod
    @torch.no_grad()
    def _followed(param: Tensor, target: Tensor) -> Tensor:
        if target is not param and param.dtype in HALVES:
            follow(target.data, param)
        return target.detach()

    @torch.no_grad()
    def step(self, *, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Update once, or not at all if found_inf is set (read on the host: one wait for the device).

        Args:
            found_inf: fp32 [1].
            grad_scale: fp32 [1]; multiplies the fp32 gradients in place, as torch.nn.utils.clip_grad_norm_ does.
        """
        found_inf, grad_scale = control("found_inf", found_inf), control("grad_scale", grad_scale)
        if found_inf is not None and found_inf.item() != 0:
            return
        grads = [None if param.grad is None else check_grad(param) for param in self._params]  # before any changes
        for param, grad, target in zip(self._params, grads, self._targets, strict=True):
            if grad is None:
                target.grad = None
                continue
            if target is not param:
                grad = grad.to(torch.float32)  # itself, or a bf16 parameter's of its dtype
            if grad_scale is not None:
                grad.mul_(on_device(grad_scale, grad.device).squeeze(0))
            self._followed(param, target)
            target.grad = _strided_as(target, grad)
            self._arrange_state(target)
        self.optimizer.step()
        for param, target in zip(self._params, self._targets, strict=True):
            if target is not param:
                target.grad = None
                if param.grad is not None:
                    param.copy_(target)

    def _arrange_state(self, target: Tensor) -> None:
        """Give a parameter's state its strides: a state that was loaded has those that it was saved with."""
        state = self.optimizer.state.get(target, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == target.shape:
                state[key] = _strided_as(target, value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the parameters' gradients."""
        for param in self._params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the masters."""
        return {"optimizer": self.optimizer.state_dict(), "masters": self.masters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; 16-bit parameters receive their masters' values, and the inner state keeps the saved dtypes."""
        masters = state_dict["masters"]
        if len(masters) != len(self._params):
            raise ValueError(f"the state has {len(masters)} masters, this optimizer {len(self._params)} parameters")
        rows = list(zip(self._params, self._targets, masters, strict=True))
        for i, (param, target, master) in enumerate(rows):
            if (master is None) != (target is param) or (master is not None and master.shape != param.shape):
                raise ValueError(f"the state's master {i} does not fit a {param.dtype} parameter {tuple(param.shape)}")
        inner = copy.deepcopy(state_dict["optimizer"])  # torch takes tensors as its own, and steps would change them
        self.optimizer.load_state_dict(inner)  # what it refuses leaves the parameters as they were
        if type(self.optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
            _restore_dtypes(self.optimizer, inner)
        for param, target, master in rows:
            if master is not None:
                target.copy_(master)
                param.copy_(target)


def _restore_dtypes(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Replace state that torch's load has cast to the parameters' fp32 with a loss: integers, and fp64.

    What was saved in fewer bits of floating point stays as it was cast.
    """
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    targets = [target for group in optimizer.param_groups for target in group["params"]]
    for index, target in zip(indices, targets, strict=True):
        state = optimizer.state.get(target, {})
        for key, value in saved["state"].get(index, {}).items():
            cast = state.get(key)
            if not isinstance(value, Tensor) or not isinstance(cast, Tensor) or cast.dtype == value.dtype:
                continue
            if not value.is_floating_point() or torch.promote_types(value.dtype, cast.dtype) != cast.dtype:
                state[key] = value.detach().to(cast.device)


def _strided_as(target: Tensor, values: Tensor) -> Tensor:
    """Return values of the target's shape in its strides: themselves where they have them, else a copy.

    torch's fused optimizers on CPUs walk parameter, gradient and state through memory, each in its own order.
    """
    if values.stride() == target.stride() or values.layout != torch.strided:
        return values
    return torch.empty_like(target, dtype=values.dtype, device=values.device).copy_(values)
