"""Optimizers over fp32 main gradients: fp16 and bf16 parameters have fp32 masters, a step may be skipped on device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from spu.common.dtypes import HALVES
from spu.common.torch_private import foreach_add_
from spu.ops import adamw_
from spu.ops.masters import MASTERS, correction_dtype, joined, split
from spu.ops.moments import MOMENTS, fits, load_moment, moment_layout, moments_of, new_moment, stored_moment
from spu.ops.reference.optimizer import follow
from spu.optim.checks import (
    MODES,
    PLAIN,
    Constants,
    check_grad,
    check_numbers,
    check_saved,
    check_settings,
    control,
    step_number,
)
from spu.optim.master import MasterOptimizer

__all__ = ["MASTER_KEYS", "AdamW", "MasterOptimizer", "clip_coefficient"]

MASTER_KEYS = ("master", "correction")
"""Where a state keeps the fp32 value of a 16-bit parameter: one of them."""

_KEPT = ("moments", "master_form", "_step_supports_amp_scaling")  # by copies and pickles
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, and whether they have a sign


def clip_coefficient(sqnorm_total: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), the factor of torch.nn.utils.clip_grad_norm_, on the device.

    Args:
        sqnorm_total: fp64 (or fp32) [1], the squared norm of all gradients (``spu.ops.grad_sqnorm``).
        max_norm: positive.

    Returns:
        fp32 [1].
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}; pass None to the trainer to clip nothing")
    return (max_norm / (sqnorm_total.sqrt() + 1e-6)).clamp(max=1.0).to(torch.float32)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update (decoupled weight decay, arXiv:1711.05101) in one pass per parameter.

    fp32 parameters are updated directly; fp16 and bf16 ones through an fp32 master, whose value they receive rounded
    to nearest. Nothing in ``step`` waits for a device. Gradients are fp32 and are not changed. fp64 and complex
    parameters, with gradients of their own dtype, are stepped by plain torch operations; their moments have their
    dtype. A bf16 parameter's gradient may be in bf16, as torch makes it outside a scaler's loop.

    A 16-bit weight that somebody changes between steps (load_state_dict, a clamp, averaged weights) is followed,
    element by element. An fp32 master that no longer rounds to its weight becomes the weight. A correction has no bits
    to tell an old weight from a new one: it stays, so the master becomes a value at most half a unit in the weight's
    last place from what was written. ``set_master(param, param)`` makes it exactly that.

    With ``spu.GradScaler``, and with torch's if ``fused=True``, it takes found_inf, and an unscaling still to do, from
    attributes that ``GradScaler.step`` sets. Otherwise torch's waits for the flag, as for torch's optimizers.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        amsgrad, maximize, capturable, differentiable: refused, by name, unless False.
        foreach, fused: torch's choices of an implementation; they change nothing in an update. ``fused=True`` lets
            torch's GradScaler leave overflows to ``step``, and Lightning then refuses to clip, both as with torch's.
        moments: how the two moments are kept: ``"fp32"``, ``"bf16"`` or ``"int8"`` (8 bits and a scale for 64 values),
            8, 4 or 2.1 bytes a parameter together. Those below fp32 are rounded stochastically, the same way at every
            run (``spu.ops.moments``). Where a second moment exceeds fp32 (gradients of some 1e20), an fp32 one is
            infinite and its weight stands still from then on; of ``"int8"`` the block's 64 weights become NaN.
        master: how the fp32 value of a 16-bit parameter is kept. ``"fp32"``: as ``state[param]["master"]``, 4 bytes.
            ``"16bit"``: the weight and ``state[param]["correction"]``, int16, together are that value, bit for bit (of
            bf16 all; of fp16 magnitudes from 2**-16 to 65,567, and smaller ones within 2**-40). ``"8bit"``: the same
            with an int8 correction, a master of 15 (bf16) or 18 mantissa bits (fp16), rounded stochastically.
            ``spu.ops.masters`` has the arithmetic. A state saved in other forms is converted.

    Raises:
        ValueError: for hyperparameters out of range.
    """

    _step_supports_amp_scaling = False  # True leaves overflows to step, and tells others (Lightning) not to clip
    _loading: dict[str, Any] | None = None  # the state that load_state_dict is about

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        moments: str = "fp32",
        master: str = "fp32",
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments is {moments!r}: choose one of {', '.join(map(repr, MOMENTS))}")
        if master not in MASTERS:
            raise ValueError(f"master is {master!r}: choose one of {', '.join(map(repr, MASTERS))}")
        given = {"amsgrad": amsgrad, "maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        check_settings(given | {"lr": lr})
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas is {betas!r}: give two numbers, such as (0.9, 0.999)")
        check_numbers(**{"betas[0]": betas[0], "betas[1]": betas[1]})
        betas = float(betas[0]), float(betas[1])
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._set_up(moments, master)
        self._step_supports_amp_scaling = bool(fused)

    def _set_up(self, moments: str, master: str) -> None:
        self.moments, self.master_form = moments, master
        self._constants = Constants()

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps settings, state and groups alone
        return super().__getstate__() | {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._loading is not None:  # called by torch's load_state_dict, before the user's post-hooks
            self._restore_exactly(self._loading)
        if "_constants" not in self.__dict__:  # a copy, made by copy.deepcopy or pickle
            self._set_up(state.get("moments", "fp32"), state.get("master_form", "fp32"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do.

        Raises:
            ValueError: also for a setting of torch.optim.AdamW that this class does not have.
        """
        check_settings(param_group)
        super().add_param_group(param_group)

    def set_master(self, param: Tensor, value: Tensor) -> None:
        """Give a 16-bit parameter its fp32 value, rounded to the master's form. The parameter gets it rounded further.

        The value is copied; into the tensor of the state where that has one of the right kind.
        """
        if param.dtype not in HALVES:
            raise TypeError(f"a {param.dtype} parameter has no master: it is updated directly")
        if value.shape != param.shape:
            raise ValueError(f"the master has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")
        weight, kept = value.detach(), value.detach()
        if self.master_form != "fp32":
            weight, kept = split(kept.to(device=param.device), param.dtype, self.master_form)
        self._keep(param, kept)
        if value is not param:
            param.data.copy_(weight)

    def _keep(self, param: Tensor, value: Tensor) -> None:
        """Put a master or a correction into the state, in the form of this optimizer."""
        key, dtype = self._master_entry()
        state = self.state[param]
        for other in MASTER_KEYS:
            if other != key:
                state.pop(other, None)
        old = state.get(key)
        if old is not None and (old.shape, old.dtype, old.device) == (param.shape, dtype, param.device):
            old.copy_(value)
        else:
            state[key] = value.to(device=param.device, dtype=dtype, copy=True).contiguous()

    def _master_entry(self) -> tuple[str, torch.dtype]:
        form = self.master_form
        return ("master", torch.float32) if form == "fp32" else ("correction", correction_dtype(form))

    @torch.no_grad()
    def master(self, param: Tensor) -> Tensor:
        """Return the fp32 value that is updated for a parameter: its master, or the parameter itself.

        It is the state's own tensor where masters are kept in fp32, a new one where they are corrections.
        """
        state = self.state.get(param, {})
        if param.dtype not in HALVES or not self.keeps_master(param):
            return param.detach()
        if "correction" in state:
            return joined(param.detach(), state["correction"])
        master: Tensor = state["master"]
        follow(master, param)
        return master

    def keeps_master(self, param: Tensor) -> bool:
        """Tell whether the state has an fp32 value of a parameter, as a master or a correction."""
        return any(key in self.state.get(param, {}) for key in MASTER_KEYS)

    def keeps_correction(self, param: Tensor) -> bool:
        """Tell whether :meth:`master` is made each time, of a weight and its correction."""
        return param.dtype in HALVES and "correction" in self.state.get(param, {})

    def state_layout(self, param: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return the shape and the dtype of every tensor that the state has for a parameter from the first step on.

        The state's ``step``, fp32 [1], is left out. The tensors may lie anywhere: ``state[param][key]`` may be replaced
        between steps by another dense tensor of the same values, an 8-bit moment's at a multiple of 4 bytes.
        """
        layout = {}
        if param.dtype in HALVES:
            key, dtype = self._master_entry()
            layout[key] = (param.shape, dtype)
        for key in _SIGNED:
            plain = param.dtype in PLAIN
            layout[key] = (param.shape, param.dtype) if plain else moment_layout(param.shape, self.moments)
        return layout

    def prepare(self, param: Tensor) -> dict[str, Any]:
        """Make the state of a parameter that has none yet, or bring it into this optimizer's form; return it."""
        state = self.state[param]
        plain = param.dtype in PLAIN
        if "exp_avg" not in state:
            state["step"] = torch.zeros(1, dtype=torch.float32, device=param.device)
            for key in _SIGNED:
                state[key] = torch.zeros_like(param) if plain else new_moment(param.shape, self.moments, param.device)
        step = state["step"]
        if not isinstance(step, Tensor) or step.shape != (1,):  # put here by hand
            state["step"] = step_number(step, param)
        if param.dtype in HALVES:
            self._prepare_master(param, state)
        for key in _SIGNED:  # of a checkpoint, they may have been put here in another form
            state[key] = self._as_kept(key, state[key], param)
        return state

    def _prepare_master(self, param: Tensor, state: dict[str, Any]) -> None:
        key, dtype = self._master_entry()
        if key in state and state[key].dtype == dtype:
            return
        if not self.keeps_master(param):  # torch's state has none
            self.set_master(param, param)
            return
        for key, kinds in (("master", (torch.float32,)), ("correction", (torch.int16, torch.int8))):
            old = state.get(key)
            if old is not None and (old.shape != param.shape or old.dtype not in kinds):
                raise ValueError(
                    f"the state's {key} is {old.dtype} {tuple(old.shape)}, which is none of a parameter of shape "
                    f"{tuple(param.shape)}: load the state of the same model"
                )
        self.set_master(param, self.master(param))

    def _as_kept(self, key: str, moment: Tensor, param: Tensor) -> Tensor:
        """Return a moment in the form that this optimizer keeps, rounded to nearest; itself if it has that form."""
        if param.dtype in PLAIN and moment.shape == param.shape:
            return moment.to(param.dtype)
        if not fits(moment, param.shape):
            raise ValueError(
                f"the state's {key} is {moment.dtype} {tuple(moment.shape)}, which is no moment of a parameter of "
                f"shape {tuple(param.shape)}: load the state of the same model"
            )
        if moments_of(moment) == self.moments:
            return moment
        signed = _SIGNED[key]
        return stored_moment(load_moment(moment, param.shape, signed=signed), self.moments, signed=signed)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        bf16_grads: bool = False,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, with gradients enabled.
            found_inf: fp32 [1]; if 1, nothing changes (neither values, moments nor step numbers).
            grad_scale: fp32 [1], multiplies every gradient (the clip coefficient).
            bf16_grads: take gradients in bf16 whatever the parameter's dtype: fp32 ones that have been rounded once,
                where they waited. Without it fp16 and fp32 parameters' are refused: a sum made in bf16 has lost more.

        Returns:
            The closure's result.

        Raises:
            TypeError: for a gradient that is sparse, or not fp32 (a bf16 parameter's: nor bf16; an fp64 or complex
                parameter's: not of its dtype); nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = control("found_inf", getattr(self, "found_inf", None) if found_inf is None else found_inf)
        grad_scale = control("grad_scale", grad_scale)
        divisor = control("grad_scale", getattr(self, "grad_scale", None))  # of gradients that are still scaled
        if divisor is not None:
            factor = divisor.double().reciprocal().float()
            grad_scale = factor if grad_scale is None else grad_scale * factor
        work: list[tuple[dict[str, Any], dict[torch.device, list[Tensor]]]] = []
        for group in self.param_groups:  # all are looked at before any is stepped
            check_settings(group)
            by_device: dict[torch.device, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    check_grad(param, bf16=bf16_grads)
                    by_device.setdefault(param.device, []).append(param)
            work.append((group, by_device))
        for _, by_device in work:
            for param in (param for params in by_device.values() for param in params):
                self.prepare(param)
        for group, by_device in work:
            for device, params in by_device.items():
                self._step_device(group, device, params, found_inf, grad_scale)
        return loss

    def _step_device(
        self,
        group: dict[str, Any],
        device: torch.device,
        params: list[Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        found = self._constants.unless(found_inf, 0.0, device)
        scale = self._constants.unless(grad_scale, 1.0, device)
        states = [self.state[param] for param in params]
        steps = [state["step"] for state in states]
        foreach_add_(steps, (found == 0).float().squeeze(0))
        beta1, beta2 = group["betas"]
        adamw_(
            params,
            [param.grad for param in params if param.grad is not None],
            [state.get("correction", state.get("master")) for state in states],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps,
            grad_scale=scale,
            found_inf=found,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state exactly: masters and moments are not narrowed to fp16, as torch would.

        Also takes a state of torch.optim.AdamW for the same parameters, and moments and masters of any form. Hooks are
        torch's. A correction belongs to its weight: load the model's state too, before or after.

        Raises:
            ValueError: for a torch state whose settings mean another update than this class makes.
        """
        # Behind the user's hooks, which may return another state, and before anything changes.
        last = self.register_load_state_dict_pre_hook(_begin_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    @torch.no_grad()
    def _restore_exactly(self, saved: dict[str, Any]) -> None:
        """Replace the values that torch has narrowed to the parameters' dtypes by the saved ones."""
        saved_ids = [index for group in saved["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for group in self.param_groups:  # how torch ran, which says nothing of the update
            group.update({name: False for name in MODES if group.get(name)})
        for index, param in zip(saved_ids, params, strict=True):
            for key, value in saved["state"].get(index, {}).items():
                if key == "step":
                    self.state[param][key] = step_number(value, param).clone()
                elif isinstance(value, Tensor):
                    self.state[param][key] = self._restored(key, value, param)

    def _restored(self, key: str, value: Tensor, param: Tensor) -> Tensor:
        if param.dtype in PLAIN:
            dtype = param.dtype
        else:
            narrow = key == "correction" or (key in _SIGNED and value.dtype == torch.uint8)
            dtype = value.dtype if narrow else torch.float32
        own = value.detach().to(device=param.device, dtype=dtype, copy=True)
        return self._as_kept(key, own, param) if key in _SIGNED else own


def _begin_load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    check_saved(state_dict)
    cast(AdamW, optimizer)._loading = state_dict
