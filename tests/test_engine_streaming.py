"""Streamed stages: the same bits as resident ones, for every residency, precision and number of slots."""

from __future__ import annotations

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import devices
from streamed_runs import LAYERS, MIXED, MIXED_TIE, Done, Lazy, batches, make, model, trained
from torch import nn

from spu import ModelParallelTrainer
from spu.engine.engine import StageError
from spu.memory.store import StoreError
from spu.memory.streams import HostStreams


@pytest.mark.parametrize(
    ("precision", "recompute", "residency", "slots", "buffers", "tied", "clip"),
    [
        ("fp16", True, "streamed", 2, 2, False, None),
        ("fp16", False, "streamed", 2, 1, True, None),
        ("bf16", False, "streamed", 3, 2, True, 0.1),
        ("bf16", True, "streamed", 2, 1, True, 0.1),
        ("fp32", False, "streamed", 2, 2, False, 0.1),
        ("fp32", True, "streamed", 9, 1, True, None),
        ("fp16", True, "offloaded", 2, 2, True, 0.1),
        ("fp32", False, "offloaded", 2, 1, False, None),
        ("fp16", True, MIXED, 2, 1, True, 0.1),
        ("fp32", False, MIXED_TIE, 3, 2, True, None),
    ],
)
def test_equals_the_resident_run(
    reference: None,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    recompute: bool,
    residency: Any,
    slots: int,
    buffers: int,
    tied: bool,
    clip: float | None,
) -> None:
    settings = {"precision": precision, "recompute": recompute, "max_grad_norm": clip}
    plain, own = model(tied), model(tied)
    expected = trained(make(monkeypatch, plain, None, **settings), plain)
    store = Lazy()
    found = trained(make(monkeypatch, own, store, residency, slots=slots, buffers=buffers, **settings), own)
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert store.read_bytes > 0
    assert store.closed


def test_a_weight_is_read_once_forward_and_once_backward(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own, store = model(), Lazy()
    trainer = make(monkeypatch, own, store, precision="fp16")
    weights = sum(u.weight_bytes for u in trainer._runner.updater.streaming.units.values())  # type: ignore[union-attr]
    below = sum(region.numel() for region in store.regions) - weights
    counts = []
    for x, y in batches(3):
        store.read_bytes = store.written_bytes = 0
        trainer.step(x, y)
        counts.append((store.read_bytes, store.written_bytes))
    streaming = trainer._runner.updater.streaming  # type: ignore[union-attr]
    assert streaming is not None
    units = streaming.units
    grads = sum(unit.grad_bytes for unit in units.values())
    kept = sum(units[k].weight_bytes for k in (4, 5)), sum(units[k].weight_bytes for k in (0, 1))
    assert counts[0] == (2 * weights - kept[0], grads)  # the last two stages stay in their slots for the backward
    written = sum(piece.bytes for unit in units.values() for piece in unit.written)
    state = below - grads
    assert counts[1] == counts[2] == (2 * weights - sum(kept) + grads + state, grads + state + written)
    trainer.close()


def test_between_steps_reading_gives_nan_and_writing_raises(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    trainer = make(monkeypatch, own, Lazy(), precision="fp32")
    before = own[1][0].weight.detach().clone()  # type: ignore[index]
    x, y = batches(1)[0]
    trainer.step(x, y)
    weight = own[1][0].weight  # type: ignore[index]
    assert weight.shape == before.shape
    assert weight.isnan().all()
    with pytest.raises(RuntimeError), torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"0\.weight waits in a tier below .* trainer\.flush\(\)"):
        own.state_dict()
    trainer.flush()
    assert pickle.loads(pickle.dumps(own.state_dict()))["1.0.weight"].isfinite().all()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
    assert copy.deepcopy(own)[1][0].weight.equal(weight)  # type: ignore[index]
    trainer.close()
    assert not any(module._state_dict_pre_hooks for module in own.modules())


@pytest.mark.parametrize("streams", [None, HostStreams()], ids=["alone", "beside a device"])
def test_a_skipped_step_changes_and_moves_nothing(
    reference: None, monkeypatch: pytest.MonkeyPatch, streams: HostStreams | None
) -> None:
    own, store = model(), Lazy()
    trainer = make(monkeypatch, own, store, precision="fp16", streams=streams)
    x, y = batches(1)[0]
    with torch.no_grad():
        own[1][0].weight.fill_(6e4)  # type: ignore[index]
        own[1][2].weight.fill_(6e4)  # type: ignore[index]
    assert trainer.step(x, y).skipped
    before = store.read_bytes, store.written_bytes
    trainer.flush()
    assert streams is not None or (store.read_bytes, store.written_bytes) == before
    assert own[1][0].weight.eq(torch.tensor(6e4, dtype=torch.float16)).all()  # type: ignore[index]
    trainer.close()


FAILING: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "alone": (1, {}, [0, 5, 13, 21, 30, 38]),
    "beside a device": (1, {"streams": HostStreams()}, [0, 5, 13, 21, 34]),
    "several": (2, {"devices": devices(2), "virtual": 3}, [0, 4, 9, 15]),
}
"""How many devices, their settings, and after how many transfers the last one's store fails."""


@pytest.mark.parametrize(("how", "after"), [(how, after) for how in FAILING for after in FAILING[how][2]])
def test_a_failing_store_stops_the_step(reference: None, monkeypatch: pytest.MonkeyPatch, how: str, after: int) -> None:
    count, settings, _ = FAILING[how]
    own, stores = model(), [Lazy() for _ in range(count)]
    trainer = make(monkeypatch, own, stores, precision="fp32", **settings)
    x, y = batches(1)[0]
    trainer.step(x, y)
    stores[-1].fails_after = after
    with pytest.raises((StageError, StoreError, RuntimeError), match="failed"):
        for _ in range(4):
            trainer.step(x, y)
    with pytest.raises((StageError, StoreError, RuntimeError), match="fail"):
        trainer.state_dict_for_model()
    trainer.close()
    assert all(store.closed for store in stores)


def test_an_optimizer_of_unknown_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="SGD makes its state as it likes"):
        make(monkeypatch, model(), Lazy(), optimizer=torch.optim.SGD)


def test_the_loss_may_have_parameters(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1.5))
            self.ignore_index = -100

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(x.flatten(0, 1) * self.factor, y.flatten())

    results = []
    for store in (None, Lazy()):
        own, loss = model(), Scaled()
        trainer = make(monkeypatch, own, store, precision="fp32", loss_fn=loss)
        losses = [trainer.step(x, y).loss for x, y in batches(4)]
        trainer.flush()
        results.append((losses, loss.factor.item()))
        trainer.close()
    assert results[0] == results[1]


def test_a_layer_that_changes_its_weight_is_refused(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    layer = own[4]

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layer.weight.clamp_(-0.1, 0.1)  # type: ignore[union-attr, operator]
        return nn.functional.linear(x, layer.weight)  # type: ignore[arg-type]

    trainer = make(monkeypatch, own, Lazy(), precision="fp32")
    layer.forward = forward  # type: ignore[method-assign]
    x, y = batches(1)[0]
    with pytest.raises(StageError, match="stage 4 changes a weight of its own while it runs"):
        trainer.step(x, y)
    trainer.close()


def test_a_checkpoint_goes_from_a_streamed_run_to_a_resident_one_and_back(
    reference: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also into a streamed run that has trained, whose tiers hold other state by then."""
    losses = []
    for first, second in ((None, Lazy()), (Lazy(), None), (Lazy(), Lazy())):
        trainer = make(monkeypatch, model(), first, precision="fp16", max_grad_norm=0.1)
        for x, y in batches(2):
            trainer.step(x, y)
        trainer.save(tmp_path / "saved")
        expected = [trainer.step(x, y).loss for x, y in batches(3)]
        trainer.close()
        other = make(monkeypatch, model(), second, precision="fp16", max_grad_norm=0.1)
        for x, y in batches(1):
            other.step(x, y)
        other.load(tmp_path / "saved")
        assert [other.step(x, y).loss for x, y in batches(3)] == expected
        losses.append(expected)
        other.close()
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("activations", ["keep", "exact"])
def test_a_plan_that_streams_is_run_from_a_disk(reference: None, tmp_path: Path, activations: str, count: int) -> None:
    results = []
    plain = {"residency": "resident", "schedule": "layer_outer", "virtual": LAYERS if count == 1 else 2}
    for settings in (plain, {"residency": "streamed", "tiers": f"disk={tmp_path}:1GB", "activations": activations}):
        trainer = ModelParallelTrainer(
            model(tied=count == 1), devices(count), microbatches=4, lr=1e-2, recompute=True, max_grad_norm=0.1,
            state="exact", **settings,
        )  # fmt: skip
        losses = [trainer.step(x, y).loss for x, y in batches(4)]
        plan = trainer.plan
        assert plan is not None
        assert (plan.streaming is None) == (settings is plain)
        results.append((losses, trainer.state_dict_for_model(), [stage.layers for stage in plan.stages]))
        trainer.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))
    assert count == 1 or results[0][2] == results[1][2]
    assert list(tmp_path.iterdir()) == []


def test_offloaded_weights_do_not_stay_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They were left where conversion had put them: each update wrote them to the disk."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Embedding(64, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 64))
    with ModelParallelTrainer(
        own, devices(1), microbatches=2, residency="offloaded", tiers=f"disk={tmp_path}:1GB", precision="fp16"
    ) as trainer:
        trainer.step(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long))
        trainer.flush()
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        address = own[1].weight.data_ptr()
        (modes,) = (
            modes for place, modes, *_ in maps if int(place.split("-")[0], 16) <= address < int(place.split("-")[1], 16)
        )
        assert modes.endswith("p"), "a shared mapping of a file"


@pytest.mark.parametrize(("slots", "buffers"), [(2, 1), (2, 2), (3, 2)])
def test_evaluations_in_a_row_equal_the_resident_ones(
    reference: None, monkeypatch: pytest.MonkeyPatch, slots: int, buffers: int
) -> None:
    """The first one runs the deferred updates; the others find weights in slots; the last batch is short."""
    results = []
    for store in (None, Lazy()):
        trainer = make(monkeypatch, model(), store, precision="fp16", slots=slots, buffers=buffers)
        for x, y in batches(2):
            trainer.step(x, y)
        values = [trainer.evaluate(x, y) for x, y in batches(3)]
        x, y = batches(1)[0]
        values += [trainer.evaluate(x[:3], y[:3]), trainer.step(x, y).loss, trainer.evaluate(x, y)]
        results.append(values)
        trainer.close()
    assert results[0] == results[1]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("wait", [1, 2, 7, 12, 18, 23, 25])
def test_ctrl_c_within_a_flush_loses_no_update(reference: None, monkeypatch: pytest.MonkeyPatch, wait: int) -> None:
    """It comes while a read or a write is waited for, which is not done by then; the next flush has to know of it."""

    class Store(Lazy):
        left = 0

        def read(self, region: int, into: torch.Tensor) -> Done:
            return self._interrupted(super().read(region, into))

        def write(self, region: int, data: torch.Tensor) -> Done:
            return self._interrupted(super().write(region, data))

        def _interrupted(self, done: Done) -> Done:
            task = done.task

            def wait() -> None:
                self.left -= 1
                if self.left == 0:
                    signal.raise_signal(signal.SIGINT)
                assert task is not None
                task()

            return Done(wait)

    def state(interrupted: bool) -> list[torch.Tensor]:
        store = Store()
        trainer = make(monkeypatch, model(), store)
        for x, y in batches(2):
            trainer.step(x, y)
        if interrupted:
            store.left = wait
            with pytest.raises(KeyboardInterrupt):
                trainer.flush()
        trainer.step(*batches(1)[0])
        found = [value.clone() for value in trainer.state_dict_for_model().values()]
        trainer.close()
        return found

    for have, want in zip(state(interrupted=True), state(interrupted=False), strict=True):
        assert torch.equal(have, want)
