"""A step in its two halves: forward and backward, then the update. For loops that do something between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from spu.common.interrupts import delayed_interrupts
from spu.engine.labels import labelled
from spu.engine.update import Update

if TYPE_CHECKING:
    from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["Halfway", "begin_step", "clip_now", "end_step"]


@dataclass(frozen=True)
class Halfway:
    """What a step knows before its update.

    Attributes:
        loss: of the batch, fp32, 0-dimensional.
        update: the gradients' norm before clipping, and whether they are finite.
    """

    loss: torch.Tensor
    update: Update


@torch.inference_mode(False)
def begin_step(trainer: ModelParallelTrainer, inputs: Any, targets: Any = None) -> Halfway:
    """Run forward and backward of a whole batch; the gradients wait for :func:`end_step`.

    Raises:
        ValueError, StageError: as ``trainer.step``.
    """
    inputs, targets = labelled(inputs, targets, shift=trainer.shift)
    trainer._set_up(inputs, targets)
    run = partial(trainer._reduced, inputs, targets, keep_outputs=False)
    done, update = trainer._repeated(run, inputs, targets)
    return Halfway(done.loss, update)


@torch.inference_mode(False)
def clip_now(trainer: ModelParallelTrainer, halfway: Halfway, readers: Sequence[str] = ()) -> Halfway:
    """Clip the gradients in the parameters, as a loop does before its update, which then clips nothing.

    So that code between the halves sees, and may change, what the update takes.

    Args:
        trainer: that began the step.
        halfway: what it returned.
        readers: names of that code.

    Raises:
        ValueError: layers are streamed or offloaded: their gradients are on the way to a tier.
    """
    updater = trainer._prepared().updater
    if updater.streaming is not None:
        updater.clear_gradients()
        raise ValueError(
            f"{', '.join(readers) or 'code between backward and update'} may read or change gradients before the "
            "update, and those of streamed and offloaded layers are in the tier below by then: train with "
            "residency='resident', or leave it out"
        )
    return replace(halfway, update=updater.clip(halfway.update))


@torch.inference_mode(False)
def end_step(
    trainer: ModelParallelTrainer, halfway: Halfway, settle: Callable[[Sequence[Any]], None] = lambda optimizers: None
) -> bool:
    """Update, unless a gradient was not finite; return whether it was left out (this waits for the device).

    Args:
        trainer: that began the step.
        halfway: what it returned.
        settle: called with the stages' optimizers before the update, to set their rates.
    """
    updater = trainer._prepared().updater
    settle(updater.optimizers)
    skipped = bool(halfway.update.found_inf.item())
    try:
        with delayed_interrupts():  # Ctrl-C waits: all stages are updated, or none
            trainer._update(halfway.update, 1.0)
    except BaseException:
        updater.clear_gradients()
        raise
    return skipped
