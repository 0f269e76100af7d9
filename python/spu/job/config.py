"""What one training run is: every setting, its default, and the checks that need neither model nor data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spu import schedules
from spu.ops.wire import CODECS

PRECISIONS = ("fp16", "bf16", "fp32")
TRANSFERS = ("auto", "none", *CODECS)
RECOMPUTE = ("auto", "on", "off")
MAX_STEP_TOKENS = 10**8  # twenty times the largest batches in the literature; plans of much more take for ever
MAX_PARTS = 4096
BYTE_VOCABULARY = 256

# The default model: 3.08M parameters over bytes. The defaults of TrainConfig were chosen by plain fp32 runs of 800k
# tokens on the default corpus, by the loss on the held-out end (nats a byte):
#   8 x 256 tokens a step: lr 3e-3 1.62, 6e-3 1.83
#   8 x 128 tokens a step: lr 2e-3 1.33, 3e-3 1.37, 5e-3 1.58; lr 3e-3 with beta2 0.99, weight decay 0.05: 1.52
DEFAULT_MODEL: dict[str, Any] = {
    "vocab_size": BYTE_VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}

# Where a run is placed and how long it is may change between its parts; everything else makes it another run.
PLACEMENT = ("devices", "budget")
LENGTH = ("steps", "tokens")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Saved in its folder, so that it can be resumed and its reference be trained.

    Attributes:
        model: a folder or file of a Hugging Face model; None for `DEFAULT_MODEL`.
        data: a text file; None for Python's own language reference.
        devices: names for `DeviceManager.get_devices`.
        budget: memory budgets for `DeviceManager`, or None for what is available.
        schedule: one of `spu.schedules`, or "auto": the planner's choice.
        microbatches: microbatches of one round of the schedule, or "auto".
        accumulate: rounds for one update.
        precision: "fp16", "bf16" or "fp32".
        transfer: codec between the stages, "auto" or "none".
        recompute: "auto", "on" or "off".
        steps: updates in all; None until `minutes` or `tokens` have been turned into it.
        minutes: training time to fill, measured at the start of the run.
        tokens: training tokens to fill.
        lr: peak learning rate; warmed up linearly, then a cosine down to `final_lr` of it.
        warmup: share of the steps that warm up.
        final_lr: share of `lr` at the last step.
        beta2: AdamW's second moment decay (the first is 0.9).
        weight_decay: AdamW's.
        max_grad_norm: global gradient norm to clip to.
        seq: tokens of a sequence.
        batch: sequences of a step.
        seed: of weights, batches and everything random.
        init_scale: loss scale to start from (fp16).
        growth_interval: good steps before the loss scale doubles.
        save_every: steps between checkpoints.
        evals: validation points on the curve (the last one is on the whole validation set).
        replan: after the second step, place the layers again by what it took.
    """

    model: str | None = None
    data: str | None = None
    devices: str = "auto"
    budget: str | None = None
    schedule: str = "1f1b"
    microbatches: int | str = 8
    accumulate: int = 1
    precision: str = "fp16"
    transfer: str = "int8"
    recompute: str = "auto"
    steps: int | None = None
    minutes: float | None = None
    tokens: int | None = None
    lr: float = 2e-3
    warmup: float = 0.05
    final_lr: float = 0.05
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seq: int = 128
    batch: int = 8
    seed: int = 0
    init_scale: float = 2.0**16
    growth_interval: int = 200
    save_every: int = 100
    evals: int = 10
    replan: bool = False

    def check(self) -> None:
        """Raises ValueError naming the first setting that makes no sense, its value and what to give instead."""
        if self.schedule != "auto":
            schedules.get(self.schedule)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("transfer", self.transfer, TRANSFERS)
        _one_of("recompute", self.recompute, RECOMPUTE)
        if self.microbatches != "auto":
            _at_least("microbatches", self.microbatches, 1)
        for name in ("accumulate", "seq", "batch", "save_every", "growth_interval", "evals"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "tokens"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        for name in ("lr", "max_grad_norm", "init_scale", *(["minutes"] if self.minutes is not None else [])):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{_option(name)} {value} must be a positive number")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{_option(name)} {getattr(self, name)} must be from 0 to 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"--weight-decay {self.weight_decay} must be 0 or a positive number")
        given = [_option(name) for name in ("steps", "minutes", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say twice how long to train: give one of them")
        check_step_size(self.batch, self.seq)
        parts = self.fewest_parts
        if parts > MAX_PARTS:
            raise ValueError(
                f"--microbatches {self.microbatches} x --accumulate {self.accumulate} cut a step into {parts} parts: "
                f"give numbers whose product is {MAX_PARTS} or less"
            )
        if self.batch < parts:
            raise ValueError(
                f"--batch {self.batch} has fewer sequences than --microbatches {self.microbatches} x --accumulate "
                f"{self.accumulate}: give --batch {parts} or more, or fewer microbatches"
            )

    @property
    def fewest_parts(self) -> int:
        """Into how many microbatches a step is cut at least."""
        return self.accumulate * (self.microbatches if isinstance(self.microbatches, int) else 1)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq

    def planned_steps(self) -> int | None:
        """Updates in all, from `steps`, `tokens` or the default; None if `minutes` have to be measured first."""
        if self.steps is not None:
            return self.steps
        if self.minutes is not None:
            return None
        tokens = DEFAULT_TOKENS if self.tokens is None else self.tokens
        return max(1, tokens // self.tokens_per_step)

    def lr_factor(self, step: int) -> float:
        """Share of `lr` for the update after `step` updates: linear warm-up, then a cosine down to `final_lr`."""
        steps = self.planned_steps()
        if steps is None:
            raise ValueError("the number of steps is not known yet")
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """Raises ValueError for settings that this version does not have."""
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {', '.join(unknown)}: the run was made by another version of spu")
        return TrainConfig(**values)


def check_step_size(batch: int, seq: int) -> None:
    """Raises ValueError for a step that is larger than any machine trains."""
    if batch * seq > MAX_STEP_TOKENS:
        raise ValueError(
            f"--batch {batch} x --seq {seq} is {batch * seq:.1e} tokens a step: give numbers whose product is "
            f"{MAX_STEP_TOKENS:.0e} or less"
        )


DEFAULT_TOKENS = 786_432  # about five minutes on two cores


def read_count(name: str, text: str | None) -> int | str | None:
    """A whole number or "auto" as it was typed; None stays None. Raises ValueError for anything else."""
    if text is None or text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{_option(name)} {text}: give a whole number of at least 1, or auto")
    return int(text)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {_option(name)} {value!r}: give one of {', '.join(known)}")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{_option(name)} {value} must be a whole number of at least {least}")


def resume_config(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The configuration to go on with: the saved one, placed again or made longer if asked.

    Args:
        saved: of the run.
        given: settings named on the command line.

    Raises:
        ValueError: a given setting that differs from the run's and would make it another run.
    """
    for name, value in given.items():
        old = getattr(saved, name)
        same = Path(value).resolve() == Path(old).resolve() if name in ("model", "data") and old else value == old
        if name not in (*PLACEMENT, *LENGTH) and not same:
            was = "default" if old is None else old
            raise ValueError(
                f"{_option(name)} {value} differs from the run's {was}: leave it out to go on, or start a new run"
            )
    placed = dataclasses.replace(saved, **{name: given[name] for name in PLACEMENT if name in given})
    return _lengthened(placed, {name: given[name] for name in LENGTH if given.get(name) is not None})


def _lengthened(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """More steps for a run: its learning rate follows the longer schedule from where it goes on."""
    if not given or all(value == getattr(saved, name) for name, value in given.items()):
        return saved
    wanted = dataclasses.replace(saved, **{"steps": None, "tokens": None, "minutes": None, **given})
    wanted.check()
    old, new = saved.planned_steps(), wanted.planned_steps()
    assert new is not None
    if old is not None and new < old:
        words = " ".join(f"{_option(name)} {value}" for name, value in given.items())
        raise ValueError(f"{words}: the run has {old} steps, which can be raised but not lowered: give {old} or more")
    return wanted if old != new else saved
