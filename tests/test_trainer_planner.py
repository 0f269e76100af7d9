"""Plans from settings: searched for, measured, and made again from a step's own times; with nothing lost on the way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import pytest
import torch
from memory_probe import measured_peaks
from numeric import assert_equal
from pipelines import batch as seeded_batch
from pipelines import devices
from torch import nn

import spu
from spu import ModelParallelTrainer, schedules
from spu.cost import measure
from spu.cost.measure import time_layers
from spu.devices.manager import DeviceManager
from spu.devices.tiers import parse_tiers
from spu.engine import build
from spu.engine.head_loss import HeadInput
from spu.engine.loss import cross_entropy
from spu.engine.stage import Stage
from spu.memory.streams import HostStreams
from spu.model.layers import parts_as_layers
from spu.plan import BudgetError, Plan
from spu.settings import TrainSettings
from spu.trainer.planner import Planner

pytestmark = pytest.mark.usefixtures("one_thread")

batch = functools.partial(seeded_batch, classes=6, seed=1)


class Rated(nn.Linear):
    """A linear layer that takes its time on one device."""

    slow: ClassVar[str] = "cpu:0"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(40e-3 if self.slow in threading.current_thread().name else 0.0)
        return super().forward(x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (Rated(6, 6), nn.Tanh())))


@pytest.mark.parametrize(("slow", "more", "precision"), [("cpu:0", 1, "fp32"), ("cpu:1", 0, "fp16")])
def test_layers_move_to_the_faster_device_and_training_goes_on_to_the_bit(
    slow: str, more: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rated, "slow", slow)
    lines: list[str] = []
    losses, parts = [], []
    for replan in (False, True):
        own = model()
        how = {"precision": precision, "microbatches": 2, "lr": 0.05, "report": lines.append, "replan": replan}
        with ModelParallelTrainer(own, devices(), **how) as trainer, spu.use_backend("reference"):
            losses.append([trainer.step(*batch()).loss for _ in range(3)])
            parts.append([stage.layers[1] - stage.layers[0] for stage in trainer.plan.stages])
            assert trainer.steps_done == 3
            state = trainer.state_dict_for_model()
        if not replan:
            expected = state
    assert parts[1][more] > parts[0][more]
    assert losses[0] == losses[1]
    for name, value in state.items():
        assert_equal(value, expected[name], name)
    assert any(line.startswith("planned again: layers cpu:0 ") for line in lines)


def test_what_is_auto_is_chosen_by_simulating_measured_layers() -> None:
    own = model()
    plain = copy.deepcopy(own)
    x, y = batch()
    with ModelParallelTrainer(
        own, devices(), precision="fp32", schedule="auto", microbatches="auto", loss_fn=nn.CrossEntropyLoss()
    ) as trainer:
        loss, _ = trainer.forward_backward(x, y)
        plan = trainer.plan
        assert plan.predicted.basis == "measured"
        assert plan.settings.schedule in schedules.names()
        assert 8 % plan.settings.microbatches == 0
        assert len(plan.devices) == 2
        gradients = [p.grad for p in own.parameters()]
        assert trainer.replan().predicted.basis == "measured"
    expected = nn.functional.cross_entropy(plain(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_search_needs_targets_and_replanning_a_step() -> None:
    with ModelParallelTrainer(model(), devices(), schedule="auto") as trainer:
        with pytest.raises(RuntimeError, match="no step has run yet"):
            trainer.replan()
        with pytest.raises(ValueError, match="need a sample of targets"):
            trainer.prepare(batch()[0])
    with pytest.raises(ValueError, match=r"microbatches.*'some'"):
        ModelParallelTrainer(model(), devices(), microbatches="some")


def test_predicted_beside_measured_comes_after_the_second_step_with_each_devices_bytes() -> None:
    said: list[str] = []
    with ModelParallelTrainer(model(), devices(), precision="fp32", microbatches=4, report=said.append) as trainer:
        trainer.step(*batch())
        assert said == []
        trainer.step(*batch())
        trainer.step(*batch())
        peaks = trainer.plan.predicted.peak_bytes
    (text,) = said
    rows = {tuple(line.split()[:2]): line for line in text.splitlines()}
    for name, predicted in zip(("cpu:0", "cpu:1"), peaks):
        off = float(rows[name, "peak"].split()[-1].rstrip("%"))
        assert -10 < off < 10, f"{name}: predicted {predicted}: {rows[name, 'peak']}"
    assert ("idle", "share") in rows


def test_layers_of_a_kind_are_timed_twice_and_every_layer_and_the_loss_get_seconds() -> None:
    layers = parts_as_layers([nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
    x, y = batch()
    rows = time_layers(layers, x, y, devices(), cross_entropy, precision="fp32", repeats=1)
    assert [len(row) for row in rows] == [6, 6]
    for row in rows:
        assert len({row[0], row[2], row[3], row[4]}) == 1
        assert min(row[-1]) > 0


@pytest.mark.parametrize("large", [True, False])
def test_timing_holds_no_more_than_a_stage_would(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made in the precision, never first in fp32, and once where the devices can read the same ones."""
    monkeypatch.setattr(measure, "_SHARED_BYTES", 0 if large else 1 << 40)
    converted: list[torch.dtype] = []
    places: list[set[int]] = []

    def to_precision(layers: Any, *rest: Any, **options: Any) -> None:
        converted.extend(p.dtype for layer in layers for p in layer.module.parameters())
        build.to_precision(layers, *rest, **options)

    class Noted(Stage):
        def __init__(self, index: int, layers: Any, device: Any, **options: Any) -> None:
            super().__init__(index, layers, device, **options)
            places.append({p.data_ptr() for layer in layers for p in layer.module.parameters()})

    monkeypatch.setattr(measure, "to_precision", to_precision)
    monkeypatch.setattr(measure, "Stage", Noted)
    layers = parts_as_layers([nn.Linear(6, 6), nn.Linear(6, 6)])
    time_layers(layers, *batch(), devices(), cross_entropy, precision="fp16", repeats=1)
    assert set(converted) == {torch.float16}
    assert len(set().union(*places)) == (4 if large else 8)
    assert not set().union(*places) & {p.data_ptr() for layer in layers for p in layer.module.parameters()}
    assert all(p.dtype == torch.float32 for layer in layers for p in layer.module.parameters())


class Noting(nn.Linear):
    """A linear layer that notes whether it had values to compute with, where a measurement puts nothing back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        NOTED.put(all(bool(t.any() and t.isfinite().all()) for t in (x, self.weight, self.bias, out)))
        return out


NOTED: SimpleQueue[bool] = SimpleQueue()


def test_weights_without_values_are_timed_with_some() -> None:
    """Those that wait in their files are zeros, which a card at its power limit multiplies faster."""
    layers = parts_as_layers([Noting(6, 6), nn.LayerNorm(6), Noting(6, 6)])
    for layer in layers:
        for parameter in layer.module.parameters():
            parameter.data.zero_()
    time_layers(layers, *batch(), devices(), cross_entropy, precision="fp32", repeats=1)
    seen = [NOTED.get() for _ in range(NOTED.qsize())]
    assert len(seen) >= 4
    assert all(seen)
    assert not any(bool(parameter.any()) for layer in layers for parameter in layer.module.parameters())


def test_large_weights_without_values_are_timed_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a 7B model's embedding, head and two blocks took more than its streamed training may hold."""
    monkeypatch.setattr(measure, "_SHARED_WEIGHT_BYTES", 1)
    places: dict[int, list[int]] = {}

    class Noted(Stage):
        def __init__(self, index: int, layers: Any, device: Any, **options: Any) -> None:
            super().__init__(index, layers, device, **options)
            for weight in (p for layer in layers for p in layer.module.parameters() if p.dim() > 1):
                places.setdefault(weight.untyped_storage().data_ptr(), []).append(weight.untyped_storage().nbytes())

    monkeypatch.setattr(measure, "Stage", Noted)
    layers = parts_as_layers([Noting(6, 5000), Noting(5000, 6), nn.Linear(6, 6)])
    for layer in layers[:2]:
        for parameter in layer.module.parameters():
            parameter.data.zero_()
    kept = layers[2].module.weight.detach().clone()
    time_layers(layers, *batch(), devices(1), cross_entropy, precision="fp32", repeats=1)
    assert sorted(map(len, places.values())) == [1, 2]
    assert all(NOTED.get() for _ in range(NOTED.qsize()))
    assert torch.equal(layers[2].module.weight, kept)
    assert not any(bool(p.any()) for layer in layers[:2] for p in layer.module.parameters())


def test_a_head_is_timed_with_its_loss_and_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 4,096 tokens by 151,936 words, widened on two devices, took 12 GB where the training takes 7."""
    seen: list[type] = []
    taken = Stage.loss

    def loss(self: Stage, outputs: Any, *rest: Any) -> torch.Tensor:
        seen.append(type(outputs))
        return taken(self, outputs, *rest)

    monkeypatch.setattr(Stage, "loss", loss)
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda *_, **__: pytest.fail("logits were made"))
    tokens, words = 64, 1 << 17  # large enough to be left out
    layers = parts_as_layers([nn.Linear(6, 8), nn.Linear(8, words, bias=False)])
    x, y = torch.randn(1, tokens, 6), torch.randint(words, (1, tokens))
    (row,) = time_layers(layers, x, y, devices(1), cross_entropy, precision="fp16", repeats=1)
    assert set(seen) == {HeadInput}
    assert len(row) == 3
    assert min(*row[1], row[2][0]) > 0


# Layers that move between tiers


def streaming(tmp_path: Path, budget: int = 10**6, **settings: Any) -> Planner:
    how = {"residency": "streamed", "microbatches": 2, "precision": "fp16", **settings}
    cpu = dataclasses.replace(DeviceManager().get_devices("cpu")[0], budget_bytes=budget)
    tiers = parse_tiers(f"disk={tmp_path}:1GB")
    return Planner(parts_as_layers(model()), [cpu], TrainSettings(**how), cross_entropy, tiers)


def test_a_streamed_plan_has_a_stage_for_each_layer_of_weights(tmp_path: Path) -> None:
    plan = streaming(tmp_path).plan(*batch(), measure=False)
    assert plan.streaming is not None
    assert [stage.layers for stage in plan.stages] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert plan.settings.schedule == "layer_outer"
    assert plan.streaming.residency == ("streamed",) * 4
    assert [action.stage for action in plan.actions()[0]][:4] == [0, 0, 1, 1]


def test_a_streamed_plan_is_taken_and_measured_as_it_is(tmp_path: Path) -> None:
    plan = streaming(tmp_path).plan(*batch(), measure=False)
    again = Plan.from_json(plan.to_json())
    measured = streaming(tmp_path).checked(again, *batch(), measure=True)
    assert measured.predicted.basis == "measured"
    assert measured.streaming is not None
    assert plan.streaming is not None
    assert measured.streaming.tiers == plan.streaming.tiers
    assert [s.layers for s in measured.stages] == [s.layers for s in plan.stages]
    assert streaming(tmp_path, residency="auto", schedule="gpipe").checked(again, *batch(), measure=False) == again
    with pytest.raises(ValueError, match="residency='streamed', but the trainer has 'resident'"):
        streaming(tmp_path, residency="resident").checked(again, *batch(), measure=False)
    with pytest.raises(ValueError, match="plan needs .* on cpu:0, whose budget is 100 B"):
        streaming(tmp_path, budget=100).checked(again, *batch(), measure=False)


def test_auto_streams_only_what_does_not_fit(tmp_path: Path) -> None:
    plan = streaming(tmp_path, residency="auto").plan(*batch(), measure=False)
    assert plan.streaming is None
    need = plan.predicted.peak_bytes[0]
    with pytest.raises(BudgetError, match=r"(?s)no plan fits .*no plan fits .*cpu:0 is short by"):
        streaming(tmp_path, need // 20, residency="auto").plan(*batch(), measure=False)


def test_streaming_from_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="would move nothing: there is no tier below cpu:0. Give one: disk=FOLDER"):
        ModelParallelTrainer(model(), "cpu", residency="streamed").prepare(*batch())


@pytest.mark.parametrize(
    "how",
    [
        {"residency": "streamed"},
        {"residency": "streamed", "activations": "exact", "recompute": True, "microbatches": 4},
        {"residency": "streamed", "activations": "int8", "recompute": True},
        {"residency": "offloaded", "recompute": False},
        {"residency": "offloaded", "precision": "fp32"},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_the_peak_of_every_tier_is_the_predicted_one(how: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(400, 400), nn.GELU())))
    x, y = torch.randn(512, 400), torch.randint(400, (512,))
    settings = {"precision": "fp16", "microbatches": 2, **how}
    with ModelParallelTrainer(wide, "cpu", tiers=f"disk={tmp_path}:1GB", **settings) as trainer:
        found = measured_peaks(trainer, (x, y))
        assert trainer.plan is not None
        assert trainer.plan.streaming is not None
        device, disk = trainer.plan.streaming.tiers
        assert disk.peak_bytes == found["disk"]
        assert device.peak_bytes == pytest.approx(found["cpu:0"], rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_large_vocabularies_that_stream_take_what_is_predicted(precision: str, tied: bool, tmp_path: Path) -> None:
    """In fp32 autograd's own gradients lay beside the slots that were lent for them; a tied one's from the head did."""
    torch.manual_seed(0)
    table, head = nn.Embedding(4000, 64), nn.Linear(64, 4000, bias=False)
    if tied:
        head.weight = table.weight
    net = nn.Sequential(table, nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), head)
    ids, targets = torch.randint(4000, (64, 8)), torch.randint(4000, (64, 8))
    how = {"precision": precision, "microbatches": 8, "residency": "streamed"}
    with ModelParallelTrainer(net, "cpu", tiers=f"disk={tmp_path}:1GB", **how) as trainer:
        found = measured_peaks(trainer, (ids, targets))
        assert trainer.plan is not None
        assert trainer.plan.streaming is not None
        device, disk = trainer.plan.streaming.tiers
        assert disk.peak_bytes == pytest.approx(found["disk"], abs=2 * 4096)
        assert device.peak_bytes == pytest.approx(found["cpu:0"], rel=0.01)


@pytest.mark.parametrize(("both", "share"), [(1.0, 1.0), (1.5, 2 / 3), (2.0, 0.5), (9.0, 0.5)])
def test_a_link_is_timed_in_both_directions_at_once(monkeypatch: pytest.MonkeyPatch, both: float, share: float) -> None:
    """A copy takes a second, two at one time take ``both`` seconds."""
    clock, begun = [0.0], [0]

    class Done:
        def synchronize(self) -> None:
            clock[0] += 0.0 if begun[0] == 0 else both if begun[0] == 2 else 1.0
            begun[0] = 0

    class Queues(HostStreams):
        def copy(self, into: torch.Tensor, source: torch.Tensor, after: Any = ()) -> Done:
            assert into.data_ptr() != source.data_ptr()
            begun[0] += 1
            return Done()

    monkeypatch.setattr(measure, "_LINK_BYTES", 64)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure.time_duplex(DeviceManager().get_devices("cpu")[0], Queues()) == pytest.approx(share)


def test_a_disk_is_timed_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_REGION_BYTES", 1 << 20)
    read, written = measure.time_disk(tmp_path / "new")
    assert 1e5 < read < 1e12
    assert 1e5 < written < 1e12
    assert not list((tmp_path / "new").iterdir())
