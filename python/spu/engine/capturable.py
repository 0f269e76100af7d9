"""Whether a stage's microbatches may be captured and replayed, and what their captured work depends on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spu.common.torch_private import buffers_of, parameters_of, post_accumulate_hooks
from spu.common.units import format_bytes
from spu.devices.manager import Device
from spu.engine.stage import Stage
from spu.nn.blocks import unwatched
from spu.ops.sink import has_foreign_hook
from spu.schedules import Action

__all__ = ["digest", "doubt", "lacks_room", "refusal"]

_KNOWN = ("torch.nn.", "spu.", "transformers.", "peft.")  # whose modules launch, and do nothing else in Python
_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


def digest(stage: Stage) -> list[Any]:
    """Return what a forward of the stage may depend on beside its input, to be compared with ``==``.

    For each module its plain attributes, its mode, which hooks it has, and where its tensors are; an entry begins with
    its name. The values of tensors are left out: captured work reads them where they are.
    """
    found: list[Any] = [("recompute", list(stage.recompute)), ("loss_fn", _settings(stage.loss_fn))]
    for part in stage.parts:
        for path, module in part.module.named_modules():
            plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
            tensors = [
                (name, None if t is None else (t.data_ptr(), t.dtype, t.requires_grad, _has_hook(t)))
                for name, t in (*parameters_of(module).items(), *buffers_of(module).items())
            ]
            found.append((f"{part.name}.{path}".rstrip("."), type(module), plain, tensors, unwatched(module)))
    return found


def _has_hook(tensor: Tensor) -> bool:
    return tensor.requires_grad and (has_foreign_hook(tensor) or bool(post_accumulate_hooks(tensor)))


def _settings(loss_fn: Any) -> list[Any]:
    """Return the plain settings of a loss: attributes, and arguments of a partial."""
    found: list[Any] = []
    while isinstance(loss_fn, functools.partial):
        found += [*loss_fn.args, *sorted(loss_fn.keywords.items())]
        loss_fn = loss_fn.func
    found += sorted(getattr(loss_fn, "__dict__", {}).items())
    found = [pair for pair in found if isinstance(pair[-1] if isinstance(pair, tuple) else pair, _PLAIN)]
    return [id(loss_fn), *found]


def refusal(stage: Stage, actions: Sequence[Action], *, shared: bool) -> str:
    """Return why a last stage cannot be captured as it is now; "" if it can.

    Args:
        stage: the pipeline's last.
        actions: of its rank.
        shared: it has parameters or modules of other stages, or some that are not always on their device.
    """
    own = [action for action in actions if action.stage == stage.index]
    if any(action.kind in "IW" for action in own):
        return "the schedule defers weight gradients"
    if any((a.kind, b.kind, a.microbatch) != ("F", "B", b.microbatch) for a, b in zip(own[::2], own[1::2])):
        return "the schedule runs several forwards before their backwards"
    if len([action for action in own if action.kind == "F"]) < 2:
        return "a run has one microbatch, and the first one runs eagerly"
    if shared:
        return "it shares weights with another stage, or they are not always on its device"
    if stage.activations is not None:
        return "its activations wait in the tier below"
    for part in stage.parts:
        if any(True for _ in part.named_generators()):
            return f"{part.name} has a generator of its own"
        for path, module in part.module.named_modules():
            if not unwatched(module):
                return f"{part.name}.{path} has a hook, or a forward of its own"
    for parameter in stage.parameters():
        if _has_hook(parameter):
            return f"a parameter of {tuple(parameter.shape)} has a hook on its gradient"
    return ""


def doubt(stage: Stage, known_loss: bool) -> str:
    """Return whose code nobody here knows, which may do something in Python beside launching; "" if all is known."""
    if not known_loss:
        return "loss_fn is not torch's, and its code would run once for all microbatches (graphs='on' allows it)"
    for part in stage.parts:
        for module in part.module.modules():
            cls: type[nn.Module] = type(module)
            if not cls.__module__.startswith(_KNOWN):
                return f"{cls.__name__} is not a library's, and its code would run once for all (graphs='on' allows it)"
    return ""


def lacks_room(device: Device) -> str:
    """Return why a captured microbatch would not fit beside the eager ones, whose memory it does not share; "" if it
    does. Called before a forward: what a microbatch takes is the peak so far less what is there now.
    """
    if device.torch_device.type != "cuda":
        return ""
    now, most = torch.cuda.memory_allocated(device.torch_device), torch.cuda.max_memory_allocated(device.torch_device)
    if 2 * most - now <= device.budget_bytes:
        return ""
    needed, budget = format_bytes(2 * most - now), format_bytes(device.budget_bytes)
    return f"captured work has activations of its own: {needed} in all, and the budget of {device.name} is {budget}"
