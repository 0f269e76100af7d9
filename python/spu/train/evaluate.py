"""The validation of a run: at which steps, on how much, and the mean loss over all targets that count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from spu.engine.microbatch import count_targets
from spu.train.config import TrainConfig
from spu.train.progress import clock

__all__ = ["count", "curve_windows", "is_eval_step", "mean_over_targets", "perplexity", "watched"]

_B = TypeVar("_B")
_SAY_S = 30.0
_LARGEST = 700.0  # nats; exp of more is no double


def count(targets: torch.Tensor) -> int:
    """Return how many targets have a loss."""
    return int(count_targets(targets))


def mean_over_targets(
    loss_of: Callable[[Any, torch.Tensor], float], batches: Iterable[tuple[Any, torch.Tensor]]
) -> float:
    """Return the mean loss over all targets of ``batches``, each batch weighted by how many of its targets count.

    Args:
        loss_of: inputs, targets -> the batch's mean loss over targets that are not -100.
        batches: inputs and int64 targets of any shape. One without a target that counts is left out.

    Raises:
        ValueError: no target counts.
    """
    total, targets_seen = 0.0, 0
    for inputs, targets in batches:
        if counted := count(targets):
            total += loss_of(inputs, targets) * counted
            targets_seen += counted
    if not targets_seen:
        raise ValueError("no target of the validation data counts in the loss: all are masked")
    return total / targets_seen


def watched(batches: Sequence[_B], pause: Callable[[], object]) -> Iterator[_B]:
    """Yield the batches; call ``pause`` before each, and say every half minute how long the rest takes."""
    begin = said = time.monotonic()
    for done, batch in enumerate(batches):
        pause()
        now = time.monotonic()
        if done and now - said >= _SAY_S:
            said, left = now, (now - begin) / done * (len(batches) - done)
            print(f"validating: {done:,} of {len(batches):,} batches, {clock(left)} left", flush=True)
        yield batch


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats a token: among how many tokens a uniform guess would be as good.

    Where bytes are the tokens it is one of bytes, and not comparable to a perplexity of words or subwords.
    """
    return math.exp(loss) if loss < _LARGEST else math.inf if loss == loss else math.nan


def curve_windows(config: TrainConfig) -> int:
    """Return the sequences of a validation on the way; the one at the end takes the whole validation set."""
    return config.eval_batches * config.batch


def is_eval_step(config: TrainConfig, done: int, steps: int) -> bool:
    """Tell whether a validation follows ``done`` of ``steps`` steps; one always follows the last."""
    if config.eval_every is not None:
        return done % config.eval_every == 0 or done == steps
    return done * config.evals // steps > (done - 1) * config.evals // steps
