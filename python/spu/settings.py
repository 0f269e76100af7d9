"""The settings of a training, each listed once: its type, default, allowed values and a sentence that explains it.

The dataclasses here, and those that extend them, are the only list. From them are made: the trainer's keywords, the
options of the command line and their help, the keys of YAML files, the settings in plan files and in config.json, and
all checks. A new setting is one more field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spu import schedules
from spu.common.codecs import CODECS
from spu.common.options import AUTO, Kind, Options, choice, field_of, flag, number, whole

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "ENGINES",
    "GRADS",
    "GRAD_WIRES",
    "GRAPHS",
    "PRECISIONS",
    "RESIDENCIES",
    "STATES",
    "Recompute",
    "Settings",
    "TrainSettings",
]

PRECISIONS = ("fp16", "bf16", "fp32")
RESIDENCIES = (AUTO, "resident", "offloaded", "streamed")
STATES = ("fp32", "exact", "compact")
GRADS = ("fp32", "bf16")
GRAPHS = (AUTO, "on", "off")
GRAD_WIRES = ("fp32", "fp16")
ENGINES = ("local", "distributed")
ACTIVATIONS = (AUTO, "keep", "exact", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Recompute:
    """Which layers keep only their input for the backward and run a second time there.

    Attributes:
        mode: "auto" for as few as the budgets require, "all", "none", or "given": those in ``layers``.
        layers: their indices in the model.
    """

    mode: str
    layers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, value: object) -> Recompute:
        """Return the Recompute for a user's "auto", True, False or list of layers.

        Raises:
            ValueError: it is none of them.
        """
        if isinstance(value, cls):
            return value
        if value == AUTO and isinstance(value, str):
            return cls("auto")
        if isinstance(value, bool):
            return cls("all" if value else "none")
        if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
            layers = list(value)
            if all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in layers):
                return cls("given", frozenset(layers))
        raise ValueError(f"recompute must be auto, True, False or a list of layers, got {value!r}")

    @staticmethod
    def parse(text: str) -> Any:
        """Return what the words of a command line mean: auto, on, off, or layers as in 0,3,4."""
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            return {"on": True, "off": False}.get(text, text)

    def plain(self) -> Any:
        """Return what ``of`` takes, as JSON."""
        return sorted(self.layers) if self.mode == "given" else {"auto": AUTO, "all": True, "none": False}[self.mode]

    def check_within(self, count: int) -> None:
        """Raise ValueError if a model of ``count`` layers has not all of ``layers``."""
        if self.layers and max(self.layers) >= count:
            raise ValueError(f"recompute names layer {max(self.layers)}, but there are layers 0 to {count - 1}")

    def __str__(self) -> str:
        words = {"auto": "auto", "all": "on", "none": "off"}
        return words.get(self.mode) or ",".join(map(str, sorted(self.layers)))

    __repr__ = __str__


def recomputed(about: str) -> Any:
    """Return a field for ``Recompute``."""
    allowed = "one of auto, on (True), off (False), or a list of layers"
    return field_of(Recompute("auto"), Kind(about, allowed, Recompute.of, Recompute.parse, Recompute.plain))


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """The settings of a plan: how a model is laid out over devices and run. A plan carries them in its file."""

    schedule: str = choice(
        "1f1b",
        "In which order the stages work. auto: the order with the shortest step when it is simulated with the layers' "
        "times, which are measured first.",
        [*schedules.names(), AUTO],
    )
    virtual: int | None = whole(
        None, "Stages on each device. Default: the schedule's own number, 2 for interleaved and zbv, else 1."
    )
    microbatches: int | str = whole(
        8, "Microbatches of one run of the schedule, or auto, as for the schedule.", auto=True
    )
    accumulate: int = whole(1, "Runs of the schedule for one update: a batch is cut into microbatches x accumulate.")
    precision: str = choice(
        "fp16",
        "Precision of weights and products. Main gradients, master weights and moments are fp32; fp16 scales the loss.",
        PRECISIONS,
    )
    transfer: str = choice(
        AUTO,
        "How tensors are packed between stages. auto packs where a link is slow; none within one process is.",
        [AUTO, "none", *CODECS],
    )
    recompute: Recompute = recomputed(  # noqa: RUF009  it makes a field
        "Keep only each layer's input for the backward. auto: only for as many layers as the budgets require."
    )

    residency: str = choice(
        AUTO,
        "Where layers are while they are not worked on. resident: on their device. offloaded: their weights there, "
        "optimizer state and gradients in the tier below. streamed: everything below. auto: resident if that fits.",
        RESIDENCIES,
    )
    state: str = choice(
        "fp32",
        "Form of the optimizer's state. fp32: 12 bytes a 16-bit weight. exact: 4.1, the same fp32 master as a 16-bit "
        "correction of the weight, moments of 8 bits. compact: 3.1, a master of 24 bits. Only for spu.optim.AdamW.",
        STATES,
    )
    grads: str = choice(
        "fp32",
        "Form in which gradients wait in the tier below for their update. bf16: half the bytes; each fp32 sum is "
        "rounded once, by at most 2^-9 of itself. On a device they are always fp32.",
        GRADS,
    )
    activations: str = choice(
        AUTO,
        "Where a streamed model's activations between layers wait for the backward. keep: on the device. exact, fp16, "
        "int8, int4: in the tier below, as they are or packed. auto: on the device while they fit, else below, exact.",
        ACTIVATIONS,
    )

    def check(self) -> None:
        if self.grads != "fp32" and self.residency == "resident":
            raise ValueError(
                f"{self.label('grads')} {self.grads} would change nothing: gradients of resident layers stay on their "
                f"device in fp32; leave it out, or give another {self.label('residency')}"
            )
        if self.virtual is None:
            return
        if self.schedule == AUTO:
            raise ValueError(f"{self.label('virtual')} {self.virtual} needs a schedule that is named, not auto")
        schedules.stages_per_rank(self.schedule, self.virtual)

    @property
    def codec(self) -> str:
        """The codec between two devices of one process, or "none", which "auto" stands for there."""
        return "none" if self.transfer == AUTO else self.transfer

    @property
    def searched(self) -> bool:
        """Whether a search has to find the schedule or the number of microbatches."""
        return AUTO in (self.schedule, self.microbatches)

    @property
    def stages_per_rank(self) -> int:
        """How many stages each device has."""
        return schedules.stages_per_rank(self.schedule, self.virtual)

    @property
    def run_microbatches(self) -> int:
        """Microbatches of one run of the schedule, where no search has to find their number."""
        if not isinstance(self.microbatches, int):
            raise ValueError(f"{self.label('microbatches')} is auto: only a search knows the number")
        return self.microbatches

    @property
    def microbatches_in_words(self) -> str:
        """Their number for sentences: "1 microbatch", "8 microbatches"."""
        return f"{self.microbatches} microbatch{'' if self.microbatches == 1 else 'es'}"

    @property
    def parts(self) -> int:
        """Into how many microbatches a batch is cut at least."""
        return self.accumulate * (self.microbatches if isinstance(self.microbatches, int) else 1)

    @property
    def fused(self) -> bool:
        """Whether linear layers run on our ops: in 16 bits, and where the schedule defers weight gradients."""
        return self.precision != "fp32" or (self.schedule != AUTO and schedules.splits_backward(self.schedule))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The settings of a training: how it is laid out, and what no plan depends on."""

    max_grad_norm: float | None = number(
        None, "Clip the norm of all gradients to this.", otherwise="a large one, such as 1e9, clips nothing"
    )
    seed: int = whole(0, "Of every random draw.", least=0, most=2**63 - 1)
    replan: bool = flag(False, "After the second step, plan again from what it has measured.")
    graphs: str = choice(
        AUTO,
        "Capture the last stage's microbatches as CUDA graphs, from the second of a step on. auto: where it is surely "
        "exact: models and losses of torch, spu and transformers on a GPU. on: or say why not.",
        GRAPHS,
    )
    engine: str = choice(
        "local",
        "What runs the stages. local: this process, a thread for each device. distributed: the processes that torchrun "
        "has started, also on several machines, a device and its stages each.",
        ENGINES,
    )
    replicas: int = whole(
        1,
        "With engine distributed: pipelines side by side, each with its rows of the batch; processes / replicas each.",
    )
    grad_wire: str = choice(
        "fp32",
        "With replicas: the form in which gradients cross between pipelines. fp16: half the bytes; each one, and their "
        "fp32 sum, is rounded once, by at most 2^-11 of itself.",
        GRAD_WIRES,
    )
    wait_s: int = whole(600, "With engine distributed: seconds after which a process gives up waiting for another one.")
    retry: bool = flag(True, "If a step runs out of memory, plan with less and repeat it, with the same random draws.")
