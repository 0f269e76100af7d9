"""The options of ``spu train`` and ``spu plan`` beside the settings, and checks that need no model and no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spu.common.options import AUTO, Options, choice, default, flag, number, text, texts, whole
from spu.settings import PRECISIONS, Settings, TrainSettings
from spu.train.lr import LR_SCHEDULES, lr_factor

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_TOKENS",
    "LENGTH",
    "MAX_PARTS",
    "MAX_STEP_TOKENS",
    "MOST_PLANNED_TOKENS",
    "PLACEMENT",
    "WATCHING",
    "PlanOptions",
    "RunOptions",
    "TrainConfig",
    "check_lora",
    "check_step_size",
    "for_tokens_per_step",
    "option",
]

MAX_STEP_TOKENS = 10**8  # twenty times the largest batches in the literature; plans of much more would not end
MAX_PARTS = 4096
DEFAULT_TOKENS = 786_432  # about five minutes on two cores
MOST_PLANNED_TOKENS = 1 << 20  # tables of positions are made for real, some hundred bytes a token and layer type

# The default model: 3.08M parameters over bytes. The defaults of TrainConfig were chosen by plain fp32 runs of 800k
# tokens on the default corpus, by the loss on the held-out end (nats a byte):
#   8 x 256 tokens a step: lr 3e-3 1.62, 6e-3 1.83
#   8 x 128 tokens a step: lr 2e-3 1.33, 3e-3 1.37, 5e-3 1.58; lr 3e-3 with beta2 0.99, weight decay 0.05: 1.52
DEFAULT_MODEL: dict[str, Any] = {
    "vocab_size": 256,  # bytes
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

# Where a run is placed, how long it is and what is kept of it may change between its parts; everything else makes it
# another run.
PLACEMENT = ("devices", "budget", "engine", "replicas", "grad_wire", "wait_s")
LENGTH = ("steps", "tokens", "epochs")
# What is watched and kept on the way; no loss depends on it.
WATCHING = (
    "save_every", "keep", "keep_best", "export", "export_dtype",
    "evals", "eval_every", "patience", "max_loss", "max_loss_steps",
)  # fmt: skip
LORA_KINDS = ("lora", "rslora", "dora")


def option(name: str) -> str:
    """Return the option of the command line for a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings):
    """The settings of one training run. Saved in its folder, so that it can be resumed and its reference be trained."""

    label = staticmethod(option)

    model: str | None = text(None, "Folder or config.json of a Hugging Face decoder. Default: a 3M InternLM3.")
    data: tuple[str, ...] | None = texts(
        "Text, .jsonl, .csv or .parquet files, patterns or folders of them; several times. Default: Python's language "
        "reference."
    )
    val_data: tuple[str, ...] | None = texts("The same, to validate with. Default: a twentieth of the data.")
    pack: bool = flag(True, "Put several documents in a row, kept apart from each other; off: a row each, padded.")
    devices: str = text(
        AUTO, "auto, cpu, cpu:0,cpu:1, cuda:0,cpu, ...", otherwise="name them, as in cpu:0,cpu:1, or write auto"
    )
    budget: str | None = text(
        None,
        "Memory to use, and a disk to stream from: cuda:0=8GB,cpu=24GB,disk=FOLDER:100GB. Default: what is free.",
        otherwise="write DEVICE=SIZE, as in cuda:0=8GB,cpu=24GB",
    )
    steps: int | None = whole(None, "Updates; with --resume, more than before.")
    tokens: int | None = whole(None, f"Or: tokens to train on. Default: {DEFAULT_TOKENS}.")
    epochs: float | None = number(None, "Or: times to go through the training data.")
    minutes: float | None = number(None, "Or: minutes to fill, measured at the start of the run.")
    lr: float = number(2e-3, "Peak learning rate: warmed up linearly, then lowered to its last share.")
    lr_schedule: str = choice("cosine", "How the learning rate goes on after the warm-up.", LR_SCHEDULES)
    warmup: float = number(0.05, "Share of the steps that warm up.", zero=True, most=1)
    warmup_steps: int | None = whole(None, "Or: steps that warm up.", least=0)
    final_lr: float = number(0.05, "Share of the learning rate at the last step.", zero=True, most=1)
    beta2: float = number(0.95, "AdamW's second moment decay; the first is 0.9.", zero=True, most=1)
    weight_decay: float = number(0.1, "AdamW's.", zero=True)
    lora: int | None = whole(None, "Train LoRA adapters of this rank, and freeze the model.")
    lora_kind: str = choice("lora", "Its scale (rslora) or form (dora).", LORA_KINDS)
    lora_alpha: float | None = number(None, "Adapters are scaled by alpha / rank. Default: twice the rank.")
    lora_dropout: float = number(0.0, "Share of its inputs that an adapter does not see.", zero=True, most=0.99)
    lora_targets: str | None = text(None, "q_proj,v_proj,... Default: every linear layer of the blocks.")
    seq: int = whole(128, "Tokens of a sequence.")
    batch: int = whole(8, "Sequences of a step.")
    init_scale: float = number(2.0**16, "First loss scale (fp16).")
    growth_interval: int = whole(200, "Good steps before the scale doubles.")
    save_every: int = whole(100, "Steps between checkpoints.")
    keep: int = whole(1, "Checkpoints to keep, the last ones.")
    keep_best: bool = flag(False, "Also keep the checkpoint of the lowest validation loss.")
    export: str = choice(
        "last",
        "Weights of the model that is written at the end; best: of the lowest validation loss.",
        ["last", "best"],
    )
    evals: int = whole(10, "Validations on the way, evenly spread.")
    eval_every: int | None = whole(None, "Or: steps between validations.")
    eval_batches: int = whole(2, "Batches of a validation on the way; the last one is on the whole validation set.")
    export_dtype: str = choice("fp32", "Of that model's weights; fp32 has all that was trained.", PRECISIONS)
    patience: int | None = whole(None, "End the run after as many validations without a lower loss.")
    max_loss: float | None = number(None, "End the run, as diverged, where the training loss stays above this.")
    max_loss_steps: int = whole(20, "Steps in a row above it that end the run.")

    # The job's own defaults of settings
    schedule: str = default(Settings, "schedule", "1f1b", "Not given: zb on several CPUs in 16 bits.")
    microbatches: int | str = default(
        Settings, "microbatches", 8, "Not given: on CPUs fewer, of 512 tokens or more, but one for each device."
    )
    transfer: str = default(Settings, "transfer", "int8")
    max_grad_norm: float = default(TrainSettings, "max_grad_norm", 1.0)

    def check(self) -> None:
        super().check()
        given = [option(name) for name in ("steps", "minutes", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say twice how long to train: give one of them")
        if self.beta2 == 1:
            raise ValueError("--beta2 1 would never forget a gradient: give a number below 1, 0.999 for example")
        check_step_size(self.batch, self.seq)
        check_lora(self)
        parts = self.parts
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
    def step_tokens(self) -> int:
        return self.batch * self.seq

    def planned_steps(self) -> int | None:
        """Return the number of updates, from ``steps``, ``tokens`` or the default; None if ``minutes`` or ``epochs``
        decide.
        """
        if self.steps is not None:
            return self.steps
        if self.minutes is not None or self.epochs is not None:
            return None
        tokens = DEFAULT_TOKENS if self.tokens is None else self.tokens
        return max(1, tokens // self.step_tokens)

    def lr_factor(self, step: int) -> float:
        """Return the share of ``lr`` for the update after ``step`` updates."""
        steps = self.planned_steps()
        if steps is None:
            raise ValueError("the number of steps is not known yet")
        warm = max(1, round(self.warmup * steps)) if self.warmup_steps is None else self.warmup_steps
        return lr_factor(step, steps, schedule=self.lr_schedule, warm=warm, final=self.final_lr)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """The options of ``spu train`` beside the run's own configuration."""

    label = staticmethod(option)

    name: str | None = text(None, "Name of the new run. Default: the time.")
    out: str = text("runs", "Folder of all runs.")
    resume: str | None = text(
        None, "Go on with a run: its name or folder; alone: the latest; auto: with that of --name, or else begin it."
    )
    config: str | None = text(None, "YAML file of options, named as here; those given here win.")
    plan: str | None = text(None, "A plan.json of spu plan: devices, schedule, stages as it says.")
    reference: bool = flag(False, "Train in plain fp32 PyTorch instead.")
    compare: bool = flag(False, "Train both ways and print the difference.")
    sample: bool = flag(True, "Let the model write some lines.")
    tensorboard: bool = flag(False, "Write the numbers of metrics.jsonl for TensorBoard as well.")
    tokens_per_step: int | None = whole(
        None,
        "Tokens of a step, at least: --batch and --accumulate become what has them in microbatches of the same size.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Settings):
    """The options of ``spu plan``."""

    label = staticmethod(option)

    model: str = text(
        "internlm2-1.8b", "A config that comes with spu (internlm2-1.8b, -7b, -20b), a config.json, or a folder."
    )
    devices: str | None = text(
        None, "cuda:0,cpu, cpu:0,cpu:1, ... which need not be here. Default: those of the budget."
    )
    budget: str | None = text(
        None, "Memory to use, and a disk to stream from: cuda:0=8GB,cpu=64GB,disk=FOLDER:100GB. Default: what is free."
    )
    speed: str | None = text(None, "Of devices that are not here: cuda:0=rtx3070,cpu=200GFLOPS. Default: nominal ones.")
    batch: int = whole(8, "Sequences of a step.")
    seq: int = whole(2048, "Tokens of a sequence.", most=MOST_PLANNED_TOKENS)
    lora: int | None = default(TrainConfig, "lora", None)
    lora_kind: str = default(TrainConfig, "lora_kind", "lora")
    lora_targets: str | None = default(TrainConfig, "lora_targets", None)
    frozen: bool = flag(False, "Freeze matrices and train norms and biases: takes about what adapters take.")
    same_order: bool = flag(False, "Use every device, in the order given.")
    out: str = text("plan.json", "Where the plan is written.")
    picture: str | None = text(None, "Draw it: a .png, .svg or .pdf file.")
    config: str | None = text(None, "YAML file of options, named as here; those given here win.")

    # Planning leaves to the search what training does not
    schedule: str = default(Settings, "schedule", AUTO)
    microbatches: int | str = default(Settings, "microbatches", AUTO)


def check_lora(options: TrainConfig | PlanOptions) -> None:
    """Raise ValueError for a setting of adapters without adapters, or adapters of a model that is frozen already."""
    for name in ("lora_kind", "lora_alpha", "lora_dropout", "lora_targets"):
        value = getattr(options, name, None)
        if options.lora is None and value not in (None, 0.0, "lora"):
            raise ValueError(f"{option(name)} {value} is of adapters, and there are none: give --lora RANK with it")
    if options.lora is not None and getattr(options, "frozen", False):
        raise ValueError(f"--frozen and --lora {options.lora}: adapters freeze the model themselves: give one of them")


def for_tokens_per_step(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Return ``batch``, ``accumulate`` and ``microbatches`` of steps with at least ``tokens`` tokens.

    A step becomes more runs of the schedule, each as now: as many sequences, in as many microbatches. Where layers may
    be streamed it becomes one run of more microbatches: a stage comes in for all of a step's at once.

    Raises:
        ValueError: the batch is not made of equal runs.
    """
    rows, rest = divmod(config.batch, config.accumulate)
    if rest:
        raise ValueError(
            f"--tokens-per-step {tokens}: --batch {config.batch} is no multiple of --accumulate {config.accumulate}: "
            "give a --batch that is, or leave --accumulate out"
        )
    runs = -(-tokens // (rows * config.seq))
    if _may_stream(config) and config.accumulate == 1 and isinstance(config.microbatches, int):
        return {"batch": runs * rows, "accumulate": 1, "microbatches": runs * config.microbatches}
    return {"batch": runs * rows, "accumulate": runs}


def _may_stream(config: TrainConfig) -> bool:
    """Tell whether the settings name a tier below a device, or ask for one."""
    names = {part.split("=")[0].strip().lower().split(":")[0] for part in (config.budget or "").split(",")}
    return config.residency in ("offloaded", "streamed") or "disk" in names or {"cuda", "cpu"} <= names


def check_step_size(batch: int, seq: int) -> None:
    """Raise ValueError for a step that is larger than any machine trains."""
    if batch * seq > MAX_STEP_TOKENS:
        raise ValueError(
            f"--batch {batch} x --seq {seq} is {batch * seq:.1e} tokens a step: give numbers whose product is "
            f"{MAX_STEP_TOKENS:.0e} or less"
        )
