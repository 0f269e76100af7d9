"""What a ``transformers.Trainer`` can be asked for that would not be the same here: refused by name at the start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.loss.loss_utils import LOSS_MAPPING

__all__ = ["check_arguments", "check_class", "check_given", "check_instance", "check_model", "overridden"]

_ADAMW = ("adamw_torch", "adamw_torch_fused")
_HOOKS = (
    "compute_loss",
    "training_step",
    "create_optimizer",
    "get_optimizer_cls_and_kwargs",
    "prediction_step",
    "compute_loss_context_manager",
    "autocast_smart_context_manager",
    "_clip_grad_norm",
    "_get_grad_norm",
)

# argument -> (what is allowed, what to do instead)
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "deepspeed": ((None,), "give SpuTrainer(..., spu={'residency': 'streamed', ...}): it offloads by itself"),
    "fsdp": ((None, False, "", []), "give SpuTrainer(..., spu={'devices': [...]}): it cuts the model by itself"),
    "parallelism_config": ((None,), "leave it out: one process trains, on one device or several"),
    "torch_compile": ((False, None), "leave it out: the layers run on fused ops"),
    "use_liger_kernel": ((False,), "leave it out: the layers run on fused ops"),
    "label_smoothing_factor": ((0, 0.0), "leave it out, or give ModelParallelTrainer a loss of your own"),
    "neftune_noise_alpha": ((None,), "leave it out: its noise would be drawn otherwise"),
    "auto_find_batch_size": ((False,), "leave it out: a step that runs out of memory is repeated with less"),
    "optim_args": ((None, ""), "leave it out: the optimizer is spu.optim.AdamW"),
    "optim_target_modules": ((None,), "leave it out: the optimizer is spu.optim.AdamW"),
    "fp16_full_eval": ((False,), "leave it out: evaluation runs in the training's precision"),
    "bf16_full_eval": ((False,), "leave it out: evaluation runs in the training's precision"),
    "sharded_ddp": ((None, "", []), "leave it out"),
    "debug": ((None, "", []), "leave it out: its hooks look for whole layers' calls; transformers.Trainer has it"),
}


def check_class(cls: type, base: type) -> None:
    """Raise TypeError if a subclass has changed what the engine does in the base's place."""
    for name in _HOOKS:
        here = _changed(cls, base, name)
        if here is not None:
            raise TypeError(_not_called(here.__name__, name))


def check_instance(trainer: Any, base: type) -> None:
    """Raise TypeError if a trainer itself was given a function in the place of one that the engine replaces."""
    for name in _HOOKS:
        if name in vars(trainer):
            raise TypeError(_not_called(base.__name__, name))


def overridden(trainer: Any, base: type, names: Iterable[str]) -> bool:
    """Tell whether a subclass of the user's, or the trainer itself, has one of these methods of its own."""
    return any(name in vars(trainer) or _changed(type(trainer), base, name) is not None for name in names)


def _changed(cls: type, base: type, name: str) -> type | None:
    """Return the user's class that has changed a method."""
    here = next(c for c in cls.__mro__ if name in vars(c))
    return None if here is base or here.__module__.startswith(("spu.", "transformers.")) else here


def _not_called(owner: str, name: str) -> str:
    return (
        f"{owner}.{name} would not be called: the engine computes loss, gradients and update. Use "
        "transformers.Trainer for it, or spu.ModelParallelTrainer with loss_fn= and optimizer="
    )


def check_given(**given: Any) -> None:
    """Raise ValueError for an argument of the constructor that cannot be taken; None is none."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"SpuTrainer takes no {name}: use spu.ModelParallelTrainer, which takes losses and optimizers"
            )


def check_model(trainer: Any) -> None:
    """Raise ValueError if a trainer's model has another loss than that of the next tokens, as transformers counts it.

    transformers knows a causal language model by its ``loss_type``, which it takes from the class's name: GPT-2's and
    CTRL's have none. Their losses are divided by the number of all labels, the first of each row too.
    """
    if trainer._loss_shifts_labels:
        return
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    name, loss = type(model).__name__, getattr(model, "loss_function", None)
    shifts = loss is not None and loss is LOSS_MAPPING["ForCausalLM"]
    if shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"transformers.Trainer divides {name}'s loss by a number that counts the first label of each row, which "
            f"has no prediction: its loss_type is {getattr(model, 'loss_type', None)!r}. Say that it is a causal "
            "language model: model.loss_type = 'ForCausalLM'"
        )
    raise ValueError(
        f"SpuTrainer trains causal language models, and {name}'s loss is another: use spu.ModelParallelTrainer with "
        "its loss, or spu.accelerate(model) with transformers.Trainer"
    )


def check_arguments(args: Any) -> None:
    """Raise ValueError for training arguments that would not be done as asked."""
    for name, (allowed, instead) in _ARGUMENTS.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"TrainingArguments.{name}={value!r} is not possible with SpuTrainer: {instead}")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in _ADAMW:
        raise ValueError(
            f"TrainingArguments.optim={optim!r} is not possible with SpuTrainer: use {' or '.join(_ADAMW)}"
        )
    if args.world_size > 1:
        raise ValueError(
            f"SpuTrainer trains in one process, and there are {args.world_size}: start it with python, not torchrun, "
            "and name the devices in spu={'devices': [...]}"
        )
