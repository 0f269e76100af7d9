"""The end of a step: one gradient norm and one found_inf over all stages, then every stage's optimizer at once."""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spu import ops
from spu.common import torch_private
from spu.common.interrupts import delayed_interrupts
from spu.engine.build import BuiltStages
from spu.engine.engine import Engine
from spu.engine.make_optimizer import OptimizerFactory, make_optimizer, set_masters
from spu.engine.peers import Peers
from spu.engine.stage import Stage
from spu.engine.streaming import Streaming, add_tied
from spu.model.layers import Layer
from spu.ops.optimizer import on_device
from spu.ops.sink import has_foreign_hook, leave_to_norm
from spu.optim.adamw import AdamW, MasterOptimizer, clip_coefficient
from spu.precision import LossScaler, MainGrads

__all__ = ["Update", "Updater", "release"]


@dataclass
class Update:
    """The values that an update depends on; tensors of one element, on the scaler's device."""

    sqnorm: torch.Tensor  # fp64: finite where every gradient is
    found_inf: torch.Tensor  # fp32
    loss: torch.Tensor  # of the whole batch, also where another process has the last stage; fp32
    clipped: bool = False  # the gradients are, by `Updater.clip`

    @property
    def grad_norm(self) -> torch.Tensor:
        """fp32."""
        return self.sqnorm.sqrt().to(torch.float32)


class Updater:
    """Owns the main gradients and the optimizers of all stages.

    Args:
        built: the stages and their parameters.
        engine: runs the update of each stage where the stage is.
        scaler: the loss scaler.
        optimizer: a torch optimizer class, or a callable from a list of fp32 tensors to an optimizer; None for our
            AdamW, which a ``functools.partial`` of it also makes.
        lr: learning rate, for a class and for our AdamW.
        max_grad_norm: clip the global gradient norm to this; None for not at all.
        peers: the processes of other stages; None: all stages are in this one.
    """

    def __init__(
        self,
        built: BuiltStages,
        engine: Engine,
        scaler: LossScaler,
        *,
        optimizer: OptimizerFactory | type[torch.optim.Optimizer] | None,
        lr: float | None,
        max_grad_norm: float | None,
        make_streaming: Callable[..., Streaming] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.closed = True  # until it has put hooks and sinks on parameters
        self.broken = ""  # why the weights belong to no single step; cleared when a checkpoint is loaded
        self._built = built
        self._engine = engine
        self._scaler = scaler
        self._peers = peers
        self._max_grad_norm = max_grad_norm
        hooked = scaler.enabled or make_streaming is not None
        self._main_grads = [MainGrads(stage.parameters(), hooked=hooked) for stage in built.stages]
        self.scopes = [
            replace(
                scaler.scope(stage.device.torch_device, f"stage {stage.index}"), plain=not scaler.enabled, whole=True
            )
            for stage in built.stages
        ]
        for stage, scope in zip(built.stages, self.scopes):
            if _looks_cost(stage.device.torch_device):
                leave_to_norm(scope.found_inf)
        self.optimizers: list[AdamW | MasterOptimizer | None] = [
            make_optimizer(list(owned.values()), built.masters, optimizer, lr) if owned else None
            for owned in built.owned
        ]
        self.streaming: Streaming | None = None
        if make_streaming is not None:
            self.streaming = make_streaming(built, self.optimizers, self._main_grads)
        for index, (owned, made) in enumerate(zip(built.owned, self.optimizers)):
            empty: Collection[int] = ()
            if self.streaming is not None and index in self.streaming:
                self.streaming.fill(index)
                empty = built.empty
            if isinstance(made, AdamW):  # a streamed stage's have their places already
                set_masters(made, owned.values(), built.masters, empty)
        self.closed = False
        for module in _modules(built):
            _UPDATERS[module] = weakref.ref(self)

    def begin_step(self) -> None:
        """Forget the last step's gradients and take the current loss scale.

        Raises:
            RuntimeError: the trainer was closed.
            ValueError: a parameter that several stages use has a hook.
        """
        self.check_open()
        self.check_whole()
        self._check_hooks()
        self._scaler.begin_step()
        if self.streaming is not None:
            self.streaming.begin_step()
        for grads in self._main_grads:
            grads.begin_step()
            grads.require_scope(self._scaler.enabled)

    def _check_hooks(self) -> None:
        """Raise ValueError for a hook on a tied parameter, whose gradient is complete only after the last backward."""
        for use in self._built.tied:
            if has_foreign_hook(use.owner) or torch_private.post_accumulate_hooks(use.owner):
                known = {**self._built.away, **self._built.owned[use.owner_stage]}
                names = (name for name, p in known.items() if p is use.owner)
                raise ValueError(
                    f"{next(names, 'a parameter')} is used in stages {use.owner_stage} and {use.stage} and has a hook "
                    "on its gradient, which would see the part of one stage: remove the hook and change the gradient "
                    "between forward_backward() and an update of your own, or train with one stage"
                )

    def check_open(self) -> None:
        """Raise RuntimeError if the trainer was closed."""
        if self.closed:
            raise RuntimeError("this trainer was closed, or another one has taken over its model: make a new trainer")

    @torch.inference_mode(False)  # what was made under it could not be trained, or shown again
    def show(self, *, grads: bool = False) -> None:
        """Run deferred updates and give streamed parameters their values, and their gradients if asked."""
        if self.streaming is not None:
            self.streaming.show(grads=grads)

    def hide(self) -> None:
        """Let nobody see weights whose update is deferred."""
        if self.streaming is not None:
            self.streaming.hide()

    def reveal(self) -> None:
        """Put weights that were hidden back, before a run that is no step."""
        if self.streaming is not None:
            self.streaming.reveal()

    def check_whole(self) -> None:
        """Raise RuntimeError if the weights are not those of one step, or were changed where that is lost."""
        if self.streaming is not None and self.streaming.broken:
            self.broken = self.streaming.broken
        if self.broken:
            raise RuntimeError(f"{self.broken}: load a checkpoint, or make a new trainer for a new model")
        if self.streaming is not None:
            self.streaming.check_unchanged()

    def check_own(self) -> None:
        """Raise RuntimeError if another trainer has taken over the model, and with it the exact values."""
        if any(module in _UPDATERS and _UPDATERS[module]() is not self for module in _modules(self._built)):
            raise RuntimeError("another trainer has taken over this one's model: ask that one for its state")

    def has_gradients(self) -> bool:
        """Tell whether the backwards of this step have reached any parameter."""
        streamed = self.streaming is not None and self.streaming.has_gradients()
        return streamed or any(p.grad is not None for stage in self._built.stages for p in stage.parameters())

    def reduce(self, loss: torch.Tensor, lr_factor: float = 1.0) -> Update:
        """Add up the gradients of tied parameters; return the norm over all gradients, found_inf and the loss.

        Args:
            loss: this process's part of it.
            lr_factor: of the coming update: all processes must have the same one.

        Raises:
            ValueError: they have another one, another batch, or other settings of an optimizer.
        """
        self._end_backward()
        # (6) in docs/architecture.md
        for use in self._built.tied:
            if not use.apart and not self._streams(use.owner_stage):  # whose gradient is on its way down
                add_tied(use)
        if self._peers is not None:
            self._peers.reduce()
        sums = self._engine.each(self._sqnorm)
        parts = torch.stack([on_device(each, self._scaler.device) for each in sums])
        if self._peers is not None:
            groups = [group for optimizer in self.optimizers for group in _groups(optimizer)]
            trained, factor = self.has_gradients(), _factor(lr_factor)
            parts, loss = self._peers.joined(parts.reshape(-1), loss, trained=trained, lr_factor=factor, groups=groups)
        total = parts.sum(0)
        # A gradient that is not finite in one microbatch is not finite in the sum, unless a user's hook repaired it.
        found_inf = (~total.isfinite()).to(torch.float32)
        for stage, scope in zip(self._built.stages, self.scopes):
            if _looks_cost(stage.device.torch_device):  # what products left to the norm
                torch.maximum(scope.found_inf, on_device(found_inf, scope.found_inf.device), out=scope.found_inf)
                break  # the scaler's flag is that of all scopes
        return Update(total, found_inf, loss)

    def apply(self, update: Update, lr_factor: float) -> None:
        """Step every optimizer, or none of them if a gradient was not finite, and adapt the loss scale.

        Raises:
            ValueError: a factor that is no number of 0 or more; nothing has changed then.
        """
        lr_factor = _factor(lr_factor)
        clip = None if update.clipped else self._clip_factor(update)

        def step(stage: Stage) -> None:
            optimizer = self.optimizers[stage.index]
            if optimizer is None:
                return
            if self.streaming is not None and stage.index in self.streaming:
                self.streaming.defer(stage.index, update.found_inf, clip)
            else:
                device = stage.device.torch_device
                scale = None if clip is None else on_device(clip, device)
                optimizer.step(found_inf=on_device(update.found_inf, device), grad_scale=scale)

        with self._rates(lr_factor):  # (7) in docs/architecture.md
            try:
                self._engine.each(step)
                if self._peers is not None:
                    self._peers.agree()
            except BaseException as error:
                self.broken = f"an update failed half-way ({type(error).__name__}: {error})"
                raise
        self._scaler.update(update.found_inf)
        self.hide()

    def clip(self, update: Update) -> Update:
        """Multiply the gradients of resident stages by the clip coefficient now; ``apply`` then does not."""
        factor = self._clip_factor(update)
        if factor is not None:

            def scale(stage: Stage, factor: torch.Tensor = factor) -> None:
                for gradient in self._gradients(stage):
                    gradient.mul_(on_device(factor, stage.device.torch_device).to(gradient.dtype))

            self._engine.each(scale)
        return replace(update, clipped=True)

    def _clip_factor(self, update: Update) -> torch.Tensor | None:
        return None if self._max_grad_norm is None else clip_coefficient(update.sqnorm, self._max_grad_norm)

    @contextlib.contextmanager
    def _rates(self, factor: float) -> Iterator[None]:
        """Multiply every rate by ``factor`` for one update.

        Between updates ``group["lr"]`` belongs to the user, or to a torch scheduler.

        Raises:
            ValueError: the factor is not 1, and the optimizer has no rate that it could multiply.
        """
        groups = [group for optimizer in self.optimizers for group in _groups(optimizer)] if factor != 1.0 else []
        if any("lr" not in group for group in groups):
            raise ValueError(
                f"lr_schedule gave {factor}, but the optimizer's parameter groups have no 'lr' to multiply: name its "
                "rate 'lr', or give no lr_schedule"
            )
        changed = [(group, group["lr"], group["lr"] * factor) for group in groups]
        for group, _, now in changed:
            group["lr"] = now
        try:
            yield
        finally:
            for group, before, now in changed:
                if group["lr"] is now:  # some optimizers set it themselves
                    group["lr"] = before

    def clear_gradients(self) -> None:
        """Drop every gradient, after a step that failed half-way."""
        with delayed_interrupts():
            self._end_backward()
            if self._peers is not None:
                self._peers.cancel()
            for stage in self._built.stages:
                for parameter in stage.parameters():
                    parameter.grad = None
            self.hide()

    def masters(self) -> dict[int, torch.Tensor]:
        """Return the fp32 values of the 16-bit parameters, by parameter id."""
        self.show()
        found: dict[int, torch.Tensor] = {}
        for owned, optimizer in zip(self._built.owned, self.optimizers):
            for parameter in owned.values():
                if parameter.dtype.itemsize == 2 and optimizer is not None:
                    found[id(parameter)] = optimizer.master(parameter)
        return found

    def close(self) -> None:
        """Take hooks and sinks off the parameters and give the model its ties back; harmless when called twice."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.streaming is not None and not self.streaming.failed:  # who uses it has been told
                self.show()
        finally:
            if self.streaming is not None:
                self.streaming.close()
            for grads in self._main_grads:
                grads.close()
            self._built.restore()

    def __del__(self) -> None:
        over = getattr(sys, "is_finalizing", None)  # at the very end of a process, sys is None here
        if over is not None and not over():  # the tiers are closed by then
            self.close()  # a trainer that is dropped gives the model back too

    def _end_backward(self) -> None:
        for grads in self._main_grads:
            grads.require_scope(False)

    def _streams(self, stage: int) -> bool:
        return self.streaming is not None and stage in self.streaming

    def _sqnorm(self, stage: Stage) -> torch.Tensor:
        found = self.streaming.sqnorm(stage.index) if self.streaming is not None else None
        if found is not None:
            return found
        gradients = self._gradients(stage)
        return ops.grad_sqnorm(gradients if self._peers is None else self._peers.measured(gradients))

    def _gradients(self, stage: Stage) -> list[torch.Tensor]:
        owned = self._built.owned[stage.index].values()
        return [parameter.grad for parameter in owned if parameter.grad is not None]


# Which updater has put hooks and ties of its own into a module. A notebook makes one trainer after another.
_UPDATERS: WeakKeyDictionary[nn.Module, weakref.ref[Updater]] = WeakKeyDictionary()


def release(layers: Sequence[Layer]) -> dict[int, torch.Tensor]:
    """Close every other trainer that still has its hooks and ties in these layers.

    Returns:
        The fp32 values that it held of 16-bit parameters, by parameter id.
    """
    masters: dict[int, torch.Tensor] = {}
    for layer in layers:
        for module in layer.module.modules():
            updater = _UPDATERS[module]() if module in _UPDATERS else None
            if updater is not None:
                masters |= updater.masters()
                updater.close()
                updater._built.unfuse()
    return masters


def _factor(value: Any) -> float:
    """Return what an ``lr_schedule`` gave as a number."""
    try:
        factor = float(value)
    except (TypeError, ValueError):
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise ValueError(f"lr_schedule gave {value!r}: it must return a factor of 0 or more, which multiplies the rate")
    return factor


def _modules(built: BuiltStages) -> Iterator[nn.Module]:
    return (module for stage in built.stages for layer in stage.parts for module in layer.module.modules())


def _looks_cost(device: torch.device) -> bool:
    """Tell whether a look for values that are not finite may be a pass of its own, as after cuBLASLt's products."""
    return device.type == "cuda"


def _groups(optimizer: AdamW | MasterOptimizer | None) -> list[dict[str, Any]]:
    return [] if optimizer is None else optimizer.param_groups
