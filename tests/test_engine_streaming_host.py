"""Updates by the host beside a device, with a CPU in the device's place: the same bits as in a resident run."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checked_streams import CheckedStreams, Moment, watched
from streamed_runs import MIXED, MIXED_TIE, Lazy, batches, make, model, trained
from torch import nn

from spu import ModelParallelTrainer
from spu.engine import hosted
from spu.engine.counted import counted_bytes
from spu.engine.engine import StageError
from spu.engine.streaming import Streaming
from spu.memory import changes, slab
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.slab import Pinning
from spu.memory.streams import HostStreams
from spu.model.deferred import Reading, defer
from spu.optim.adamw import AdamW

EXPECTED: dict[tuple[Any, ...], list[Any]] = {}  # of resident runs


def expected(monkeypatch: pytest.MonkeyPatch, tied: bool, settings: dict[str, Any]) -> list[Any]:
    key = (tied, *settings.values())
    if key not in EXPECTED:
        own = model(tied)
        EXPECTED[key] = trained(make(monkeypatch, own, None, **settings), own)
    return EXPECTED[key]


def same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))


def streaming_of(trainer: ModelParallelTrainer) -> Streaming:
    streaming = trainer._runner.updater.streaming  # type: ignore[union-attr]
    assert streaming is not None
    return streaming


def run(
    monkeypatch: pytest.MonkeyPatch, store: Any, streams: CheckedStreams, residency: Any = "streamed", **how: Any
) -> list[Any]:
    """Train with streams that check themselves."""
    own = model(True)
    trainer = make(monkeypatch, own, store, residency, streams=streams, **SETTINGS, **how)
    watched(streaming_of(trainer).residencies[0], streams)
    return trained(trainer, own)


SETTINGS = {"precision": "fp16", "recompute": True, "max_grad_norm": 0.1}


@pytest.mark.parametrize(
    ("below", "precision", "recompute", "residency", "slots", "buffers", "tied", "clip"),
    [
        ("host", "fp16", False, "streamed", 2, 1, True, None),
        ("disk", "bf16", False, "streamed", 3, 2, True, 0.1),
        ("disk", "fp32", True, "streamed", 9, 1, True, None),
        ("host", "fp16", True, "offloaded", 2, 2, True, 0.1),
        ("disk", "fp32", False, "offloaded", 2, 1, False, None),
        ("host", "fp16", True, MIXED, 2, 1, True, 0.1),
        ("disk", "fp32", False, MIXED_TIE, 3, 2, True, None),
    ],
)
def test_equals_the_resident_run(
    reference: None,
    monkeypatch: pytest.MonkeyPatch,
    below: str,
    precision: str,
    recompute: bool,
    residency: Any,
    slots: int,
    buffers: int,
    tied: bool,
    clip: float | None,
) -> None:
    settings = {"precision": precision, "recompute": recompute, "max_grad_norm": clip}
    wanted, own = expected(monkeypatch, tied, settings), model(tied)
    store: Any = HostStore() if below == "host" else Lazy()
    how = {"slots": slots, "buffers": buffers, "streams": HostStreams()}
    assert same(trained(make(monkeypatch, own, store, residency, **how, **settings), own), wanted)


@pytest.mark.parametrize("residency", ["streamed", "offloaded", MIXED, MIXED_TIE], ids=str)
def test_weights_that_are_read_last_are_those_of_a_whole_model(
    reference: None, monkeypatch: pytest.MonkeyPatch, residency: Any
) -> None:
    wanted, own = expected(monkeypatch, True, SETTINGS), model(True)
    values, empty = own.state_dict(), dict[int, nn.Parameter]()
    for module in own.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = empty.setdefault(id(p), nn.Parameter(p.data.to("meta"), p.requires_grad))
    defer(own, lambda tensors: [tensor.copy_(values[name]) for name, tensor in tensors.items()] and None)
    monkeypatch.setattr(Reading, "read_trained", lambda self: None)  # as of a plan that streams
    assert same(trained(make(monkeypatch, own, HostStore(), residency, streams=HostStreams(), **SETTINGS), own), wanted)


@pytest.mark.parametrize(
    ("below", "residency", "slots", "buffers"),
    [
        ("host", "streamed", 2, 1),
        ("host", "streamed", 3, 2),
        ("disk", "streamed", 2, 1),
        ("disk", "streamed", 9, 2),
        ("host", MIXED, 2, 1),
        ("disk", "offloaded", 2, 2),
    ],
)
def test_every_use_of_a_slot_waits_for_the_one_before(
    reference: None, monkeypatch: pytest.MonkeyPatch, below: str, residency: Any, slots: int, buffers: int
) -> None:
    wanted, streams = expected(monkeypatch, True, SETTINGS), CheckedStreams()
    store: Any = HostStore() if below == "host" else Lazy()
    assert same(run(monkeypatch, store, streams, residency, slots=slots, buffers=buffers), wanted)
    assert not streams.errors, streams.errors[:3]
    assert streams.copies > 80
    assert streams.checked > 400


class NoWaitToFill(CheckedStreams):
    """Copies in wait for nothing."""

    def copy(self, into: torch.Tensor, source: torch.Tensor, after: Any = ()) -> Moment:
        return super().copy(into, source, () if self._is_device(into) else after)


class NoWaitToEmpty(CheckedStreams):
    """Copies out wait for nothing."""

    def copy(self, into: torch.Tensor, source: torch.Tensor, after: Any = ()) -> Moment:
        return super().copy(into, source, after if self._is_device(into) else ())


class NoHold(CheckedStreams):
    """Computations wait for no copy."""

    def hold(self, event: Any) -> None:
        return


@pytest.mark.parametrize("below", ["host", "disk"])
@pytest.mark.parametrize("broken", [NoWaitToFill, NoWaitToEmpty, NoHold])
def test_a_missing_wait_would_be_seen(
    reference: None, monkeypatch: pytest.MonkeyPatch, below: str, broken: type[CheckedStreams]
) -> None:
    streams = broken()
    store: Any = HostStore() if below == "host" else Lazy()
    monkeypatch.setattr(changes, "checksum", lambda _: 0)  # which may see that weights come too late, and end the run
    run(monkeypatch, store, streams, slots=2, buffers=1)
    assert streams.errors


@pytest.mark.parametrize("below", ["host", "disk"])
def test_an_update_before_its_gradients_have_come_would_be_seen(
    reference: None, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    wanted = expected(monkeypatch, True, SETTINGS)
    monkeypatch.setattr(Moment, "synchronize", lambda self: None)
    store: Any = HostStore() if below == "host" else Lazy()
    assert not same(run(monkeypatch, store, CheckedStreams(), slots=2, buffers=1), wanted)


def test_what_is_not_page_locked_goes_through_small_buffers(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, locked = expected(monkeypatch, True, SETTINGS), list[int]()

    def register(address: int, size: int) -> str:
        locked.append(size)
        return "" if len(locked) < 6 else "out of memory"

    monkeypatch.setattr(slab, "STEP_BYTES", 1)
    monkeypatch.setattr(hosted, "CHUNK_BYTES", 4096)
    streams, store = CheckedStreams(), HostStore(Pinning(register, lambda address: None))
    assert same(run(monkeypatch, store, streams, slots=2, buffers=1), wanted)
    assert "are page-locked" in store.note
    assert not streams.errors, streams.errors[:3]
    assert streams.copies > 100


@pytest.mark.parametrize("below", ["host", "disk"])
def test_an_update_that_fails_ends_the_step(reference: None, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    own, threads = model(), list[str]()
    store: Any = HostStore() if below == "host" else Lazy()
    trainer = make(monkeypatch, own, store, precision="fp32", streams=HostStreams())
    (x, y), *_ = batches(1)
    trainer.step(x, y)
    original, fails = AdamW.step, [True]

    def step(self: AdamW, *args: Any, **keywords: Any) -> Any:
        threads.append(threading.current_thread().name)
        if len(threads) == 2 and fails:
            raise ArithmeticError("no such update")
        return original(self, *args, **keywords)

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(StageError, match="no such update"):
        trainer.step(x, y)
    assert all("below" in name for name in threads)
    assert all(p.device.type == "cpu" and p.grad is None for p in own.parameters())
    with pytest.raises(RuntimeError, match="failed half-way"):
        trainer.step(x, y)
    fails.clear()
    trainer.close()
    assert own[1][0].weight.isfinite().all()  # type: ignore[index]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("beside", ["a device", "nothing"])
@pytest.mark.parametrize("below", ["host", "disk"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_trainer_that_is_dropped_gives_its_last_values_back(
    reference: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, below: str, beside: str
) -> None:
    """Python ends the parts of a cycle in any order: an update waited for ever for a thread that had gone."""
    found = []
    for closed in (True, False):
        own, store = model(), HostStore() if below == "host" else DiskStore(str(tmp_path))
        streams = {"streams": HostStreams()} if beside == "a device" else {}
        trainer = make(monkeypatch, own, store, precision=precision, **streams)
        gc.disable()  # it comes where it is called
        try:
            for x, y in batches(2):
                trainer.step(x, y)
            threads = threading.active_count()
            if closed:
                trainer.close()
            trainer.itself = trainer  # type: ignore[attr-defined]
            del trainer, store
            gc.collect()
        finally:
            gc.enable()
        assert threading.active_count() < threads
        found.append(list(own.parameters()))
    assert same(*found)


def test_what_the_device_alone_knows_reaches_the_host(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """found_inf is not looked at when the step ends: the host's thread finds that there is nothing to do."""
    results = []
    for finite in (True, False):
        own = model()
        trainer = make(monkeypatch, own, HostStore(), precision="fp32", streams=HostStreams())
        streaming, (x, y) = streaming_of(trainer), batches(1)[0]
        trainer.step(x, y)
        for index, deferred in list(streaming._deferred.items()):
            assert deferred.arrives is not None
            if not finite:
                deferred.found_inf.fill_(1.0)
            assert streaming.pending(index)
        trainer.flush()
        assert not any(map(streaming.pending, streaming.units))
        results.append({name: tensor.clone() for name, tensor in own.state_dict().items()})
        trainer.close()
    fresh = model()
    assert torch.equal(results[1]["1.0.weight"], fresh[1][0].weight)  # type: ignore[index]
    assert not torch.equal(results[0]["1.0.weight"], fresh[1][0].weight)  # type: ignore[index]


@pytest.mark.parametrize("below", ["host", "disk"])
def test_of_weights_that_stayed_what_was_trained_comes_alone(
    reference: None, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """An adapter's update below took the frozen weights beside it to the device again."""

    def adapted() -> nn.Sequential:
        own = model()
        for name in ("0.weight", "1.0.weight", "3.0.bias"):
            own.get_parameter(name).requires_grad_(False)
        return own

    wanted, own = adapted(), adapted()
    seen = trained(make(monkeypatch, wanted, None, **SETTINGS), wanted)
    new_store: Any = {"host": HostStore, "disk": Lazy}[below]
    trainer = make(monkeypatch, own, new_store(), slots=5, streams=HostStreams(), **SETTINGS)
    residency = streaming_of(trainer).residencies[0]
    bring, came = residency.store.bring, list[Any]()  # type: ignore[attr-defined]

    def counted(slot: int, parts: Any, update: Any = None) -> Any:
        came.extend(parts)
        return bring(slot, parts, update)

    monkeypatch.setattr(residency.store, "bring", counted)
    brought = []
    for x, y in batches(3):
        came.clear()
        trainer.step(x, y)
        brought.append(sorted(part.region for part in came))
    changed = {piece.region for unit in residency.units.values() for piece in unit.written}
    left = residency.units[0], residency.units[5]  # which share a slot
    assert brought[2] == sorted({*changed, *(piece.region for unit in left for piece in unit.weights)})
    trainer.close()
    own = adapted()
    again = make(monkeypatch, own, new_store(), slots=5, streams=HostStreams(), **SETTINGS)
    assert same(trained(again, own), seen)


def test_a_weight_that_a_resident_stage_shares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    residency = ["streamed"] * 5 + ["resident"]
    with pytest.raises(ValueError, match="used by a resident stage too"):
        make(monkeypatch, model(True), HostStore(), residency, precision="fp32", streams=HostStreams())


def test_a_trained_weight_in_another_order_of_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    own[1][0].weight = nn.Parameter(torch.randn(16, 32).t())  # type: ignore[index]
    with pytest.raises(ValueError, match="is not contiguous"):
        make(monkeypatch, own, HostStore(), precision="fp32", streams=HostStreams())


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_bytes_are_counted_in_their_tiers(
    reference: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    store: Any = HostStore() if kind == "host" else DiskStore(tmp_path)
    trainer = make(monkeypatch, model(), store, precision="fp32", streams=HostStreams(), slots=2, buffers=1)
    (x, y), *_ = batches(1)
    assert trainer._runner is not None
    with counted_bytes(trainer._runner) as peaks:
        trainer.step(x, y)
    residency = streaming_of(trainer).residencies[0]
    units = residency.units.values()
    weights = sum(max(unit.weight_bytes for unit in units if unit.index % 2 == k) for k in range(2))
    between = weights + max(unit.grad_bytes + unit.state_bytes for unit in units)
    assert residency.slot_bytes == weights + max(unit.grad_bytes for unit in units)
    if kind == "host":
        assert peaks["host"] == residency.stored_bytes
    else:
        assert peaks["disk"] == residency.stored_bytes
        assert peaks["host"] == between + store.own_bytes
    trainer.close()
