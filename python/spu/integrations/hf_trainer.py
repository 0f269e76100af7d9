"""``SpuTrainer``: a ``transformers.Trainer`` whose steps run through `spu.ModelParallelTrainer`.

Data, schedules, logging, evaluation, checkpoints and callbacks are the Trainer's own. What lies between a batch and the
updated weights is the engine's: the batches of one update are joined and cut into as many microbatches, the loss is
divided by the update's counted targets (as ``num_items_in_batch`` has it), gradients are fp32, one AdamW pass updates.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from spu.common.dtypes import DTYPES
from spu.common.files import write_json
from spu.engine.labels import IGNORED
from spu.integrations.hf_batches import joined
from spu.integrations.hf_callbacks import ShownWeights, watchers
from spu.integrations.hf_dtypes import GivenDtypes, chosen_precision
from spu.integrations.hf_loss import check_loss
from spu.integrations.hf_optimizer import FrontOptimizer, GroupedAdamW, set_rates
from spu.integrations.hf_refusals import (
    check_arguments,
    check_class,
    check_given,
    check_instance,
    check_model,
    overridden,
)
from spu.model.adapter_base import base_values, write_base
from spu.model.layers import is_adapted
from spu.trainer.adapter import adapter_state
from spu.trainer.halves import Halfway, begin_step, clip_now, end_step
from spu.trainer.trainer import ModelParallelTrainer

__all__ = ["SpuTrainer"]

_STATE = "spu"  # the engine's part of a checkpoint
_COUNTING = ("get_batch_samples", "_get_num_items_in_batch", "_prepare_inputs", "_prepare_input")  # decide the mean


class SpuTrainer(transformers.Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` for causal language models (a ``PeftModel`` too) that trains through spu's engine.

    ``bf16=True`` and ``fp16=True`` train weights in 16 bits with fp32 masters. Without them the precision is the
    model's own. In 16 bits layers compute as under autocast, also where the model came in them: a router whose product
    the model asks for in fp32 has it in 16 bits, as with ``transformers.Trainer`` and ``bf16=True``.

    After ``train()`` each weight has the dtype that it was given in, as with ``transformers.Trainer``, and so it has in
    what is saved: an fp32 model gets its masters, a bf16 model these rounded once. The engine's part of a checkpoint
    has the masters themselves. Random draws (dropout) are the engine's: a function of seed, step, microbatch and layer.

    Args:
        args, keywords: as ``transformers.Trainer`` takes them.
        spu: keywords for `spu.ModelParallelTrainer`: ``devices``, ``microbatches``, ``residency``, ``tiers``,
            ``recompute``, ``state``, ... Default: the device that ``TrainingArguments`` chose, a microbatch for each
            batch of an update.

    Raises:
        ValueError, TypeError: what would not be done as asked, by name; see `spu.integrations.hf_refusals`.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *more: Any, spu: Mapping[str, Any] | None = None, **keywords: Any
    ) -> None:
        check_class(type(self), SpuTrainer)
        check_given(
            compute_loss_func=keywords.get("compute_loss_func"),
            optimizer_cls_and_kwargs=keywords.get("optimizer_cls_and_kwargs"),
            optimizers=keywords["optimizers"] if any(keywords.get("optimizers", ())) else None,
        )
        if args is not None:
            check_arguments(args)
            args._n_gpu = min(args.n_gpu, 1)  # no DataParallel: the engine takes further GPUs
        self._given = dict(spu or {})
        self._engine: ModelParallelTrainer | None = None
        self._dtypes: GivenDtypes | None = None
        self._halfway: Halfway | None = None
        self._batches: list[Any] = []  # of an update that is not complete yet
        self._resumed: Path | None = None
        super().__init__(model, args, *more, **keywords)
        check_arguments(self.args)
        check_given(  # they may have been given by their place
            compute_loss_func=self.compute_loss_func,
            optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs,
            optimizers=self.optimizer or self.lr_scheduler,
        )
        self._own_accelerator()
        check_model(self)

    # The engine

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _own_accelerator(self) -> None:
        """Let accelerate think that it has the model: it would put a forward of its own into it, under autocast."""
        self.accelerator._models = [self.model]

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return what the whole model is evaluated under: autocast, as ``transformers.Trainer`` has it.

        While the engine has the model its norms are fp32 in every 16-bit precision.
        """
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        if self._engine is not None:
            trained = DTYPES[self._engine.precision]
            dtype = trained if trained.itemsize == 2 else None
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def _settings(self) -> dict[str, Any]:
        args = self.args
        own = {
            "devices": [str(args.device)],
            "microbatches": args.gradient_accumulation_steps,
            "max_grad_norm": args.max_grad_norm or None,
            "seed": args.seed,
        }
        if "precision" not in self._given:
            own["precision"] = chosen_precision(self._module, bf16=args.bf16, fp16=args.fp16)
        return own | self._given

    def _make_engine(self) -> ModelParallelTrainer:
        model = self._module
        decayed = set(self.get_decay_parameter_names(model))
        undecayed = frozenset(id(p) for name, p in model.named_parameters() if name not in decayed)
        optimizer = partial(GroupedAdamW, undecayed=undecayed, weight_decay=self.args.weight_decay, **self._adamw())
        engine = ModelParallelTrainer(model, shift=True, optimizer=optimizer, **self._settings())
        self._dtypes = GivenDtypes(model, engine.precision)  # it converts them when it sees a batch
        return engine

    def _adamw(self) -> dict[str, Any]:
        args = self.args
        return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make what schedulers and callbacks see; the engine makes an optimizer for each stage.

        Raises:
            RuntimeError: a second ``train()``: the first one's moments are gone.
        """
        if self.optimizer is not None:
            raise RuntimeError(
                "this SpuTrainer has trained already: go on with train(resume_from_checkpoint=...) of a new one, or "
                "give model_init"
            )
        decayed = set(self.get_decay_parameter_names(self._module))
        named = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if (name in decayed) is keep], "weight_decay": decay}
            for keep, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        self.optimizer = FrontOptimizer(groups, self._adamw(), self._update)
        return self.optimizer

    def _update(self) -> bool:
        engine, halfway, front = self._engine, self._halfway, self.optimizer
        assert engine is not None
        assert halfway is not None
        assert front is not None
        self._halfway = None
        return end_step(engine, halfway, lambda optimizers: set_rates(optimizers, front.param_groups))

    def _show_weights(self) -> None:
        engine = self._engine
        if engine is not None and engine.plan is not None and engine.plan.streaming is not None:
            engine.flush()

    def state_dict_for_model(self) -> dict[str, torch.Tensor]:
        """Return the model's values at full precision (fp32 masters), by its own names, copied to the CPU.

        While it trains in 16 bits its parameters hold them rounded: make averages of weights from these.
        """
        engine = self._engine
        if engine is not None and engine.plan is not None:
            return engine.state_dict_for_model()
        return {name: value.detach().to("cpu", copy=True) for name, value in self._module.state_dict().items()}

    # The loop's places

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer()
        self.create_scheduler(num_training_steps=max_steps)
        self.model_wrapped = self._module
        check_instance(self, SpuTrainer)
        check_loss(self._module, counted=bool(self.model_accepts_loss_kwargs))
        self._own_accelerator()
        self.accelerator._optimizers = [self.optimizer]  # asked whether a step was skipped
        self._engine = self._make_engine()
        callbacks = self.callback_handler.callbacks
        callbacks.insert(0, ShownWeights(callbacks, self._show_weights))
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of one update, and how many targets count in them.

        Raises:
            ValueError: a callback ended the epoch in the midst of the update before; the model's loss cannot be taken
                over several batches.
        """
        if self._batches:
            raise ValueError(
                f"the epoch ended after {len(self._batches)} of the batches of an update, whose gradients "
                "transformers adds to the next update: end it in on_step_end, not in on_substep_end"
            )
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if items is None and len(batches) > 1:
            raise ValueError(
                f"{type(self.model).__name__} takes no num_items_in_batch: over several batches its loss is no mean "
                "over targets. Give gradient_accumulation_steps=1 and a larger batch; spu={'microbatches': ...} cuts it"
            )
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of all batches of an update when its last one comes; return their loss there.

        Raises:
            ValueError: the data ended before the update was complete; another number of targets than counts.
        """
        self._batches.append(self._prepare_inputs(inputs))
        wanted = self.current_gradient_accumulation_steps
        if len(self._batches) < wanted:
            return torch.zeros((), device=self.args.device, dtype=torch.float32)
        if not self.accelerator.sync_gradients:
            raise ValueError(
                f"the data ended after {wanted} of the {self.args.gradient_accumulation_steps} batches of an update, "
                "whose gradients transformers adds to the first update of the next epoch: give a stream with whole "
                "updates (islice, or take), or gradient_accumulation_steps=1 and a larger batch, which "
                "spu={'microbatches': ...} cuts"
            )
        model.train()
        batch = joined([dict(batch) for batch in self._batches])
        self._batches = []
        self._check_items(batch, num_items_in_batch)
        engine = self._engine
        assert engine is not None
        if self._resumed is not None:
            engine.prepare(batch)
            engine.load(self._resumed)
            self._resumed = None
        halfway = begin_step(engine, batch)
        who = watchers(self.callback_handler.callbacks)
        self._halfway = clip_now(engine, halfway, who) if who else halfway
        return self._halfway.loss.detach().to(self.args.device)

    def _check_items(self, batch: Mapping[str, Any], items: Any) -> None:
        """Raise ValueError if code of a subclass divides the loss by another number than that of counted targets."""
        if items is None or not overridden(self, SpuTrainer, _COUNTING):
            return
        counted = int((batch["labels"][..., 1:] != IGNORED).sum())
        if int(items) != counted:
            raise ValueError(
                f"{type(self).__name__} counts {int(items)} targets in an update, and {counted} labels of it are not "
                f"{IGNORED}: the engine divides the loss by these; use transformers.Trainer for another mean"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        assert self._halfway is not None
        return self._halfway.update.grad_norm.squeeze()  # the update clips by it

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return loss, logits and labels of a batch: the loss alone from the engine, logits from the whole model.

        Raises:
            ValueError: logits of a model that lies on several devices.
        """
        engine = self._engine
        if engine is None or engine.plan is None:
            with self._autocast(self.args.device):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only and inputs.get("labels") is not None:
            loss = engine.evaluate(dict(self._prepare_inputs(inputs)))
            return torch.tensor(loss, device=self.args.device), None, None
        kinds = {device.torch_device for device in engine.devices}
        if len(kinds) > 1:
            raise ValueError(
                "logits for compute_metrics and predict() come from the whole model, which lies on "
                f"{', '.join(map(str, sorted(kinds, key=str)))}: set prediction_loss_only=True while it trains"
            )
        engine.flush()
        with self._autocast(next(iter(kinds))):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        engine, exact = self._engine, state_dict
        if engine is not None and engine.plan is not None and state_dict is None:
            assert self._dtypes is not None
            exact = adapter_state(engine)[1] if is_adapted(self._module) else engine.state_dict_for_model()
            exact = self._dtypes.state(exact)
        super()._save(output_dir, exact)
        place = Path(str(output_dir or self.args.output_dir))
        if exact is not state_dict and is_adapted(self._module):
            write_base(place, base_values(self._module))
        config = place / "config.json"
        if exact is not state_dict and config.is_file():  # it says what the weights have while they train
            values = json.loads(config.read_text(encoding="utf-8"))
            assert self._dtypes is not None
            write_json(config, values | {"dtype": self._dtypes.config})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._engine is not None and self._engine.plan is not None:
            self._engine.save(Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        place = Path(checkpoint) / _STATE
        if not place.exists():
            raise ValueError(
                f"{checkpoint} has no folder {_STATE!r}: it was saved by another trainer, or with save_only_model; "
                "give one that SpuTrainer saved, or load its model and start anew"
            )
        self._resumed = place  # the engine is planned on the first batch

    def _finalize_training(self, *arguments: Any) -> Any:
        self._end_engine()
        return super()._finalize_training(*arguments)

    def _inner_training_loop(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super()._inner_training_loop(*arguments, **keywords)
        finally:
            if self._engine is not None:  # it has failed
                with contextlib.suppress(RuntimeError):
                    self._end_engine()

    @torch.no_grad()
    def _end_engine(self) -> None:
        """Give the model back, in the dtypes that it had, on the device that the arguments name."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self.callback_handler.remove_callback(ShownWeights)
        engine.close()
        if engine.plan is None:
            return
        assert self._dtypes is not None
        exact = self._dtypes.state(engine.state_dict_for_model())
        self._dtypes.give_back(self._module, exact, self.args.device)
