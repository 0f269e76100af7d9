"""A plan: which layers go where, in which order they run, and what that takes. It is written as JSON, also by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from spu import schedules
from spu.common.codecs import CODECS as WIRE_CODECS
from spu.common.files import write_atomically
from spu.common.options import Options
from spu.plan.memory import StageBytes
from spu.plan.show.table import plan_table
from spu.plan.streaming import StreamingPlan
from spu.settings import Settings

__all__ = ["CODECS", "VERSION", "Plan", "Predicted", "StagePlan"]

VERSION = 7
CODECS = ("none", *WIRE_CODECS)


@dataclass(frozen=True)
class StagePlan(StageBytes):
    """One stage: its layers, its device, its peak bytes by category, its time for one microbatch.

    Attributes:
        device: the device's name, such as ``cpu:0``.
        layers: (first, last + 1), indices into the model's layers.
        layer_names: their names.
        recompute: indices of the layers that keep only their input and are recomputed in the backward.
        budget_bytes: what the device may use, for all of its stages together.
        each_bytes: what one microbatch in flight keeps; ``saved_bytes`` is the most of them at a time.
        left_bytes: what a microbatch keeps between input gradient and weight gradients, where these are deferred.
        forward_s: predicted seconds of one forward.
        backward_s: predicted seconds of one backward, recomputation included.
        weight_s: the part of it that weight gradients take, which a schedule may defer.
        update_s: predicted seconds of the update of the stage's weights, once a step.
    """

    device: str
    layers: tuple[int, int]
    layer_names: tuple[str, ...]
    recompute: tuple[int, ...]
    budget_bytes: int
    each_bytes: int
    left_bytes: int
    forward_s: float
    backward_s: float
    weight_s: float
    update_s: float


@dataclass(frozen=True)
class Predicted:
    """The prediction of a step, by simulation.

    Attributes:
        step_s: seconds of a step: every run of the schedule, loss and packing included, and the update.
        update_s: the part of it that the update takes.
        idle_share: share of the devices' time in which nothing runs, the update left out: the bubble.
        transfer_s: seconds of one transfer over each boundary.
        link_bytes: what crosses each boundary in a step, both directions.
        peak_bytes: the most that each device holds, in the order of `Plan.devices`.
        basis: what the times rest on: "measured" layer times, "estimated" from counted work and measured devices, or
            "nominal": counted work at made-up speeds, so that shares are right and seconds are not.
    """

    step_s: float
    update_s: float
    idle_share: float
    transfer_s: tuple[float, ...]
    link_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    basis: str


@dataclass(frozen=True)
class Plan:
    """How a model is trained on several devices. `save` and `load` round-trip exactly.

    Attributes:
        model: the model's name.
        settings: what it was made for; schedule and microbatches are never "auto".
        rows: sequences (rows) of one microbatch; 0 if not known.
        tokens: tokens of a sequence; 0 if not known.
        codecs: "none" or the codec of each boundary.
        stages: one entry per stage.
        predicted: time, bubble, peaks.
        uncounted: (layer, how) for layers, or the loss, whose needs could not be counted on fake tensors: "measured" on
            real ones in a copy, or "bound": taken from the sizes of parameters and input.
        streaming: how layers move between tiers; None if all of them stay on their devices.
        version: of the file format.
    """

    model: str
    settings: Settings
    rows: int
    tokens: int
    codecs: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    predicted: Predicted
    uncounted: tuple[tuple[str, str], ...] = ()
    streaming: StreamingPlan | None = None
    version: int = field(default=VERSION)

    @property
    def recompute(self) -> bool:
        """Whether any layer is recomputed in the backward."""
        return any(stage.recompute for stage in self.stages)

    @property
    def recomputed_layers(self) -> frozenset[int]:
        """The layers that are."""
        return frozenset(k for stage in self.stages for k in stage.recompute)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, each once, in the order of ranks."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def virtual(self) -> int:
        """How many stages each device has."""
        return len(self.stages) // len(self.devices)

    def actions(self) -> list[list[schedules.Action]]:
        """Return one run of the schedule: what each device does."""
        return schedules.get(self.settings.schedule)(
            len(self.devices), self.settings.run_microbatches, virtual=self.virtual
        )

    def timeline(self) -> schedules.Timeline:
        """Return the predicted timeline of one run of the schedule."""
        if self.streaming is not None:
            seconds = [(stage.forward_s, stage.backward_s) for stage in self.stages]
            spans = self.streaming.spans(seconds, self.settings.run_microbatches)
            names = self.devices
            return schedules.Timeline.from_spans(spans, ranks=[names.index(stage.device) for stage in self.stages])
        actions = self.actions()
        durations = [(s.forward_s, max(s.backward_s - s.weight_s, 0.0), s.weight_s) for s in self.stages]
        return schedules.simulate(actions, durations, self.predicted.transfer_s)

    def table(self, width: int | None = None) -> str:
        """Return the plan as a table of plain text, with stages as columns where it is wider than `width`."""
        return plan_table(self, width)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        data = dataclasses.asdict(self)
        stages = [{**stage, "total_bytes": self.stages[k].total_bytes} for k, stage in enumerate(data["stages"])]
        written = {"format": "spu plan", **data, "settings": self.settings.to_json(), "stages": stages}
        return json.dumps(written, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any], source: str = "the plan") -> Plan:
        """Return the plan that `text` describes.

        Args:
            text: what `to_json` returned, perhaps edited; or the object that a JSON parser made of it.
            source: what to call it in errors, such as its file name.

        Raises:
            ValueError: if it is not a plan of this version or does not hold together; names the entry and the fix.
        """
        try:
            data = json.loads(text) if isinstance(text, str) else dict(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
        try:
            plan = _read_plan(data)
            _check(plan)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file; an existing file is replaced only when the new one is complete."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing or not a plan; names the file and the entry.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"cannot read the plan {os.fspath(path)} ({why}): give a file that spu plan or plan.save() wrote"
            ) from None
        return cls.from_json(text, source=os.fspath(path))


def _read_plan(data: Any) -> Plan:
    if not isinstance(data, dict) or data.get("format") != "spu plan":
        raise ValueError('not an spu plan (no "format": "spu plan"); `spu plan` writes one')
    if data.get("version") != VERSION:
        raise ValueError(f"version is {data.get('version')!r}, this spu reads {VERSION}; make the plan again")
    content = {key: value for key, value in data.items() if key != "format"}
    stages = content.get("stages")
    if isinstance(stages, list):
        for k, stage in enumerate(stages):
            _check_total(stage, f"stages[{k}]")
        content["stages"] = [{key: value for key, value in stage.items() if key != "total_bytes"} for stage in stages]
    return cast(Plan, _read(Plan, {"uncounted": [], "streaming": None, **content}, ""))  # a file may leave these out


def _check_total(stage: Any, where: str) -> None:
    if not isinstance(stage, dict):
        raise ValueError(f"{where} must be an object, got {stage!r}")
    parts: list[Any] = [stage.get(entry.name) for entry in dataclasses.fields(StageBytes)]
    total = stage.get("total_bytes")
    if total is not None and all(isinstance(part, int) for part in parts) and total != sum(parts):
        raise ValueError(
            f"{where}.total_bytes is {total!r}, but its parts add up to {sum(parts)}; correct it or leave it out"
        )


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return `value`, as JSON gave it, turned into `kind`: a dataclass, a tuple, or a plain type."""
    if type(None) in typing.get_args(kind):
        return None if value is None else _read(typing.get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list) or (items[-1] is not ... and len(value) != len(items)):
            raise ValueError(f"{where} must be a list{'' if items[-1] is ... else f' of {len(items)}'}, got {value!r}")
        return tuple(_read(items[0], entry, f"{where}[{k}]") for k, entry in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_TYPE_WORDS[kind]}, got {value!r}")
    if kind in (int, float) and not 0 <= value < math.inf:
        raise ValueError(f"{where} must be finite and not negative, got {value!r}")
    return value


_TYPE_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the plan'} must be an object, got {value!r}")
    if issubclass(kind, Options):
        return kind.from_json(value, f"{where}.")
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind)]
    prefix = f"{where}." if where else ""
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]} is not an entry of a plan; there are {', '.join(names)}")
    return kind(**{name: _read(hints[name], value[name], prefix + name) for name in names})


def _check(plan: Plan) -> None:
    """Raise ValueError where entries do not fit together."""
    if plan.settings.searched:
        raise ValueError("settings.schedule and settings.microbatches must be a schedule and a number here, not auto")
    if not plan.stages:
        raise ValueError("stages is empty; a plan has at least one stage")
    boundaries, p = len(plan.stages) - 1, plan.predicted
    lists = {"codecs": plan.codecs, "predicted.transfer_s": p.transfer_s, "predicted.link_bytes": p.link_bytes}
    for name, values in lists.items():
        if len(values) != boundaries:
            raise ValueError(f"{name} must have one entry per boundary, {boundaries}, got {len(values)}")
    for k, codec in enumerate(plan.codecs):
        if codec not in CODECS:
            raise ValueError(f"codecs[{k}] is {codec!r}; there are {', '.join(map(repr, CODECS))}")
    if plan.streaming is not None:
        plan.streaming.check(len(plan.stages))
    _check_layers(plan)


def _check_layers(plan: Plan) -> None:
    expected = 0
    for k, stage in enumerate(plan.stages):
        first, stop = stage.layers
        if first != expected or stop <= first:
            raise ValueError(
                f"stages[{k}].layers is [{first}, {stop}], but must start at {expected} and hold at least one layer: "
                "stages take consecutive layers, [first, last + 1]"
            )
        if len(stage.layer_names) != stop - first:
            raise ValueError(
                f"stages[{k}].layers [{first}, {stop}] are {stop - first} layers, but layer_names has "
                f"{len(stage.layer_names)}; move the names together with the layers"
            )
        outside = [index for index in stage.recompute if not first <= index < stop]
        if outside:
            raise ValueError(
                f"stages[{k}].recompute names layer {outside[0]}, which is not one of its [{first}, {stop}]"
            )
        expected = stop
    _check_devices(plan)


def _check_devices(plan: Plan) -> None:
    """Raise ValueError where a stage is on another device than its schedule says."""
    names = plan.devices
    if len(plan.stages) % len(names):
        raise ValueError(f"{len(plan.stages)} stages cannot be spread evenly over {len(names)} devices; change either")
    try:
        ranks = schedules.stage_ranks(plan.settings.schedule, len(names), plan.virtual)
    except ValueError as error:
        raise ValueError(f"{plan.virtual} stages on each of {len(names)} devices: {error}") from None
    for k, (stage, rank) in enumerate(zip(plan.stages, ranks, strict=True)):
        if stage.device != names[rank]:
            schedule = plan.settings.schedule
            raise ValueError(
                f"stages[{k}].device is {stage.device!r}, but {schedule} has that stage on {names[rank]!r}; "
                "change it, or the schedule"
            )
    if len(plan.predicted.peak_bytes) != len(names):
        raise ValueError(
            f"predicted.peak_bytes must have one entry per device, {len(names)}, got {len(plan.predicted.peak_bytes)}"
        )
