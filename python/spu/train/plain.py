"""The same training in plain PyTorch: fp32, one device, ``torch.optim.AdamW``, nothing of spu's in the step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spu.data.corpus import Corpus
from spu.engine.microbatch import split_batch
from spu.settings import Settings
from spu.train import progress as console
from spu.train.adapter import make_trained_model
from spu.train.config import PLACEMENT, WATCHING, TrainConfig
from spu.train.evaluate import count, curve_windows, is_eval_step, mean_over_targets, watched
from spu.train.metrics import MetricsFile, save_result
from spu.train.run_folder import RunFolder
from spu.train.signals import Stopped, StopSignals

__all__ = ["evaluate", "make_optimizer", "mean_loss", "reference_key", "train_reference", "train_step"]

RESULT, METRICS = "reference.json", "reference_metrics.jsonl"
# How the pipeline does its work; the reference has none of it, so that its result does not depend on them.
_NOT_OURS = {*PLACEMENT, *WATCHING, *Settings.names(), "replan", "init_scale", "growth_interval"} - {
    "evals",  # its curve
    "eval_every",
}
_MOST_TOKENS = 2048
"""Of its microbatches. Plain PyTorch is the faster the fewer they are, and has to hold the activations of one."""


def reference_key(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Return all that the reference's result depends on."""
    settings = {name: value for name, value in config.to_json().items() if name not in _NOT_OURS}
    return {**settings, "corpus": corpus.sha256}


def mean_loss(model: nn.Module, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in fp32 of next-token targets int64 [batch, tokens], of which -100 is not counted.

    Args:
        model: a decoder of transformers.
        inputs: its token ids [batch, tokens], or a dict of its keywords.
        targets: as above.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, torch.Tensor]]) -> float:
    """Return the mean loss over all targets of ``batches`` that are not -100."""
    model.eval()
    with torch.no_grad():
        result = mean_over_targets(lambda x, y: mean_loss(model, x, y).item(), batches)
    model.train()
    return result


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW of the parameters that are trained, in its fastest form: one call for all of them."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, corpus: Corpus, step: int
) -> dict:
    """Update once on the batch of ``step``, in as few microbatches as ``_MOST_TOKENS`` allows. Return the row for the
    metrics.
    """
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = config.lr * config.lr_factor(step)
    inputs, targets = corpus.batch(config.seed, step, config.batch, config.seq)
    parts = min(-(-config.step_tokens // _MOST_TOKENS), len(targets))
    optimizer.zero_grad(set_to_none=True)
    loss, counted = 0.0, count(targets)
    for x, y in zip(split_batch(inputs, parts), split_batch(targets, parts), strict=True):
        if own := count(y):
            share = mean_loss(model, x, y) * (own / counted)
            share.backward()
            loss += share.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    optimizer.step()
    speed = targets.numel() / (time.perf_counter() - begin)  # all of the batch's tokens, as the pipeline counts them
    return {"loss": loss, "grad_norm": norm, "tokens_per_s": speed}


def _check(signals: StopSignals, step: int) -> None:
    if signals.asked is not None:
        raise Stopped(f"reference stopped at step {step}; it starts over next time")


def train_reference(config: TrainConfig, corpus: Corpus, folder: RunFolder, signals: StopSignals) -> dict[str, Any]:
    """Train and validate; write reference.json and reference_metrics.jsonl into the run's folder.

    Returns:
        {"key", "steps", "val_loss", "tokens_per_s", "seconds"}

    Raises:
        Stopped: interrupted; nothing is kept but the metrics so far.
        ValueError: the loss is not finite at the end.
    """
    steps = config.planned_steps()
    assert steps is not None, "the run has fixed its steps before"
    model = make_trained_model(config)
    optimizer = make_optimizer(model, config)
    metrics = MetricsFile(folder / METRICS)
    metrics.keep_up_to(-1)
    curve = corpus.validation_batches(config.batch, config.seq, curve_windows(config))
    seconds, shown = 0.0, console.RunningMean()
    with console.open_view("fp32 reference", steps) as view:
        for step in range(steps):
            row = train_step(model, optimizer, config, corpus, step)
            seconds += config.step_tokens / row["tokens_per_s"]
            metrics.append(step=step + 1, tokens=(step + 1) * config.step_tokens, **row)
            view.update(console.Progress(step + 1, shown.add(row["loss"]), row["tokens_per_s"]))
            if is_eval_step(config, step + 1, steps):
                metrics.append(step=step + 1, val_loss=evaluate(model, curve))
            _check(signals, step + 1)
    whole = corpus.validation_batches(config.batch, config.seq)
    val_loss = evaluate(model, watched(whole, lambda: _check(signals, steps)))
    if not math.isfinite(val_loss):
        raise ValueError(
            f"the reference diverged: its validation loss is {val_loss} after {steps} steps; it was not written: start "
            f"a new run with a smaller --lr than {config.lr:g}"
        )
    result = {
        "key": reference_key(config, corpus),
        "steps": steps,
        "val_loss": val_loss,
        "tokens_per_s": steps * config.step_tokens / seconds,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    save_result(folder / RESULT, result)
    return result
