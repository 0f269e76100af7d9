"""Dynamic loss scale that is kept and changed on a device, without a look at its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spu.common import torch_private
from spu.ops.sink import BackwardScope, open_scope

__all__ = ["LossScaler"]

_LARGEST_SCALE = 2.0**127  # a power of two in fp32
_STATE_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def _reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale, rounded as torch.amp.GradScaler rounds it."""
    return scale.double().reciprocal().float()


def _indexed(device: str | torch.device) -> torch.device:
    """Return the device as tensors on it name it: "cuda" becomes "cuda:0", "cpu:1" becomes "cpu"."""
    found = torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    return found if found.index is not None else torch.empty(0, device=found, dtype=torch.float32).device


class LossScaler:
    """Scales losses so that fp16 gradients neither underflow nor overflow; torch.amp.GradScaler's arithmetic.

    The scale reaches every fused op and hook of a backward through that backward's scope. A scope belongs to a device
    and an owner (a pipeline stage, a worker thread), each with its own found_inf, so that workers never write to the
    same flag. One step is::

        scaler.begin_step()
        scaler.scale(loss).backward()               # or open_scope(outputs, scaler.scope(device, owner))
        optimizer.step(found_inf=scaler.found_inf())
        scaler.update()

    Args:
        init_scale: the first scale; growth_factor, backoff_factor, growth_interval: as in torch.amp.GradScaler.
        enabled: False keeps the scale at 1; non-finite gradients are still found.
        device: where the scale itself lives, until :meth:`to`. With scopes on accelerators, make it one of theirs:
            ``found_inf`` gathers their flags there, and a copy to the CPU waits for the device.

    Raises:
        ValueError: for factors that cannot work.
    """

    @torch.inference_mode(False)  # its tensors change in every step, in place, whatever it was made under
    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 < init_scale <= _LARGEST_SCALE:
            raise ValueError(
                f"init_scale must be positive and at most 2**127, got {init_scale}: 2.0**16 is the usual first one"
            )
        if not growth_factor > 1:
            raise ValueError(f"growth_factor must be above 1, got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1, got {growth_interval}")
        self.enabled = enabled
        self.device = _indexed(device)
        self.growth_factor = float(growth_factor)
        self.backoff_factor = float(backoff_factor)
        self.growth_interval = int(growth_interval)
        self._scale = torch.full((1,), float(init_scale) if enabled else 1.0, dtype=torch.float32, device=self.device)
        self._growth_tracker = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._scopes: dict[tuple[torch.device, str], BackwardScope] = {}
        self._family = object()

    @torch.inference_mode(False)
    def to(self, device: str | torch.device) -> LossScaler:
        """Keep the scale on another device from now on; return this scaler. Scopes stay where they are."""
        self.device = _indexed(device)
        self._scale = self._scale.to(self.device)
        self._growth_tracker = self._growth_tracker.to(self.device)
        return self

    @torch.inference_mode(False)
    def scope(self, device: str | torch.device | None = None, owner: str = "") -> BackwardScope:
        """Return the scope of ``owner`` on ``device`` (default: the scaler's): the same tensors in every step."""
        key = (_indexed(self.device if device is None else device), owner)
        found = self._scopes.get(key)
        if found is None:
            scale = self._scale.to(key[0], copy=True)
            made = BackwardScope(scale, _reciprocal(scale), torch.zeros_like(scale), family=self._family)
            found = self._scopes.setdefault(key, made)  # one thread wins
        return found

    def begin_step(self) -> None:
        """Copy the present scale into every scope and clear every found_inf, in place and on the devices."""
        for scope in list(self._scopes.values()):
            scope.scale.copy_(self._scale, non_blocking=scope.scale.device.type != "cpu")
            scope.inv_scale.copy_(_reciprocal(scope.scale))
            scope.found_inf.zero_()

    def scale(self, loss: Tensor, owner: str = "") -> Tensor:
        """Return loss * scale; a backward from it runs in this scaler's scope for the loss's device."""
        scope = self.scope(loss.device, owner)
        # Zero-dimensional, so that types promote as with torch.amp.GradScaler.
        return open_scope(loss * scope.scale.squeeze(0), scope, fresh=True)

    def found_inf(self) -> Tensor:
        """Return fp32 [1] on the scaler's device: 1 if any scope met a non-finite gradient in this step."""
        asynchronous = self.device.type != "cpu"  # a copy to the host must have arrived when it is read
        flags = [scope.found_inf.to(self.device, non_blocking=asynchronous) for scope in list(self._scopes.values())]
        if not flags:
            return torch.zeros(1, dtype=torch.float32, device=self.device)
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0].clone()

    def update(self, found_inf: Tensor | None = None) -> None:
        """Lower the scale after a step with found_inf, raise it after ``growth_interval`` good ones in a row; on the
        device.

        Args:
            found_inf: fp32 [1], what the step was decided by; default: what the backwards saw (``found_inf``).
        """
        if self.enabled:
            torch_private.update_scale_(
                self._scale,
                self._growth_tracker,
                self.found_inf() if found_inf is None else found_inf,
                self.growth_factor,
                self.backoff_factor,
                self.growth_interval,
            )

    def get_scale(self) -> float:
        """Return the present scale. Waits for the device."""
        return self._scale.item()

    def state_dict(self) -> dict[str, Any]:
        """Return the keys and values of torch.amp.GradScaler; empty if disabled, like its. Waits for the device."""
        if not self.enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self._growth_tracker.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of this class or of torch.amp.GradScaler; do nothing if disabled.

        Raises:
            ValueError: if entries are missing (an empty state comes from a disabled scaler).
        """
        if not self.enabled:
            return
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise ValueError(
                f"this scaler state lacks {', '.join(missing)}: was it saved from a disabled scaler? Load it into "
                "LossScaler(enabled=False), or start from a fresh scale"
            )
        self._scale.fill_(state["scale"])
        self._growth_tracker.fill_(state["_growth_tracker"])
        self.growth_factor = float(state["growth_factor"])
        self.backoff_factor = float(state["backoff_factor"])
        self.growth_interval = int(state["growth_interval"])
