"""What crosses a stage boundary."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from host_side import HostSide
from numeric import assert_equal
from pipelines import WIDTH, batch, model_of, trainer
from torch import nn

from spu import ModelParallelTrainer, StageError, ops
from spu.engine import local
from spu.transfer import Link, side_for

CPU = torch.device("cpu")


def test_nothing_is_copied_between_stages_of_one_device() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 2
    link = Link(CPU)
    (received,) = link.receive(link.send((x,)))
    assert received.data_ptr() == x.data_ptr()
    assert not received.requires_grad
    assert link.sent_bytes == 48


@pytest.mark.parametrize("codec", ["int8", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_tensors_arrive_as_the_codec_leaves_them(codec: str, dtype: torch.dtype) -> None:
    tree = {
        "x": torch.randn(5, 7).t().to(dtype),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "wide": torch.randn(2, dtype=torch.float64),
        "none": None,
    }
    link = Link(CPU, codec)
    received = link.receive(link.send(tree))
    assert_equal(received["x"], ops.unpack(ops.pack(tree["x"], codec), (7, 5), dtype, codec=codec))
    assert received["x"].shape == (7, 5)
    for name in ("ids", "mask", "wide"):
        assert_equal(received[name], tree[name], name)
    assert received["none"] is None
    assert link.sent_bytes == ops.wire_bytes((7, 5), dtype, codec) + 3 * 8 + 2 + 2 * 8


def test_what_has_too_many_dimensions_for_a_wire_crosses_as_it_is() -> None:
    x = torch.randn(2, 1, 3, 1, 2, 2)
    link = Link(CPU, "int8")
    assert_equal(link.receive(link.send(x)), x)
    assert link.sent_bytes == x.numel() * 4


def test_an_overflow_is_still_seen_on_the_other_side() -> None:
    x = torch.ones(200)
    x[3], x[100] = torch.inf, torch.nan
    link = Link(CPU, "int8")
    received = link.receive(link.send(x))
    assert not torch.isfinite(received[3])
    assert not torch.isfinite(received[100])
    assert_equal(received[128:], torch.ones(72))


@pytest.mark.parametrize("codec", ops.CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_codec_would_make_infinite_crosses_as_it_is(codec: str, dtype: torch.dtype) -> None:
    """One -inf made NaN of its block's finite values, and 1e6 was infinite in fp16."""
    largest = torch.finfo(dtype).max
    for value in (-torch.inf, torch.inf, torch.nan, largest, 0.999 * largest, 60_000.0, 1e6, -1e9, 1e-40):
        x = torch.linspace(-1, 1, 200).to(dtype)
        x[70] = value
        received = Link(CPU, codec).receive(Link(CPU, codec).send(x))
        assert_equal(received.isfinite(), x.isfinite(), str(value))
        if not x[70].isfinite():
            assert_equal(received, x)


@pytest.mark.parametrize("codec", ops.CODECS)
def test_a_wire_knows_what_it_decodes_to(codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 31, 200):
        x = torch.randn(rows, 3, generator=generator)
        assert ops.is_finite_wire(ops.pack(x, codec), x.shape, x.dtype, codec=codec)
        if rows:
            x[-1, -1] = torch.inf
            assert not ops.is_finite_wire(ops.pack(x, codec), x.shape, x.dtype, codec=codec)


def test_only_what_needs_a_gradient_is_packed_forward() -> None:
    tree = {"h": torch.randn(2, 100, requires_grad=True), "mask": torch.randn(2, 100)}
    link = Link(CPU, "int8", activations=True)
    received = link.receive(link.send(tree))
    assert_equal(received["mask"], tree["mask"])
    assert not torch.equal(received["h"], tree["h"])
    assert link.sent_bytes == ops.wire_bytes((2, 100), torch.float32, "int8") + 800


class Masks(nn.Module):
    """Hands on a mask of -inf, positions and ids beside activations; ``masked`` puts -inf into these too."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = torch.zeros(len(h), 8).masked_fill(torch.arange(8) > 5, -torch.inf)
        return (h + mask if self.masked else h), mask, torch.arange(8) * 1000.5, torch.arange(8)


class Softmax(nn.Module):
    def forward(self, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        h, mask, positions, ids = given
        return (h + mask).softmax(-1) + (positions / 1000.5 - ids).abs()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("codec", ops.CODECS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_masks_cross_packed_links(precision: str, codec: str, masked: bool) -> None:
    """A -inf beside the activations made every step NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Masks(masked), Softmax(), nn.Linear(8, 3))
    x, y = torch.randn(8, 8), torch.arange(8) % 3
    plain = nn.functional.cross_entropy(model(x), y).item()
    with ModelParallelTrainer(
        model, ["cpu:0", "cpu:1"], precision=precision, microbatches=2, transfer=codec, lr=0.0
    ) as trainer:
        step = trainer.step(x, y)
        assert not step.skipped
        assert step.loss == pytest.approx(plain, abs=0.05)
        assert trainer.evaluate(x, y) == pytest.approx(plain, abs=1e-6 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_side_carries_the_same_tensors_beside_the_senders_work(codec: str | None) -> None:
    side = HostSide()
    link, plain = Link(CPU, codec, side), Link(CPU, codec)
    tree = {"x": torch.randn(3, 64), "ids": torch.arange(3), "depth": 2}
    with ops.use_backend("reference"):
        ours, theirs = link.receive(link.send(tree)), plain.receive(plain.send(tree))
    assert_equal(ours["x"], theirs["x"])
    assert_equal(ours["ids"], tree["ids"])
    assert ours["depth"] == 2
    assert link.sent_bytes == plain.sent_bytes
    link.close()
    link.close()


class _Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: object) -> None:
        self.log.append(f"{self.name} waits")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the {event}")

    def record_event(self) -> str:
        return "event"


@pytest.mark.parametrize(("source", "target", "waits"), [("cpu", "cuda:0", []), ("cuda:0", "cpu", ["side waits"])])
def test_a_copy_from_the_host_does_not_wait_for_what_the_card_has_queued(
    source: str, target: str, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(log, "current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    side = side_for(torch.device(source), torch.device(target))
    assert side is not None
    side.start(lambda: (), ())
    assert log == waits


@pytest.mark.parametrize(
    ("source", "target", "entered"),
    [
        ("cpu", "cuda:1", ["cuda:1", "stream of cuda:1"]),
        ("cuda:0", "cuda:1", ["cuda:0", "stream of cuda:1", "stream of cuda:0"]),
    ],
)
def test_a_side_leaves_no_trace_on_the_threads_own_device(
    source: str, target: str, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving a stream alone sets the device of before, which makes a context there: hundreds of megabytes of cuda:0
    beside a training on the CPU and cuda:1.
    """
    log: list[str] = []
    found: list[str] = []

    @contextmanager
    def enters(what: object) -> Iterator[None]:
        found.append(what.name if isinstance(what, _Stream) else str(what))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(log, f"stream of {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(log, "current"))
    monkeypatch.setattr(torch.cuda, "stream", enters)
    monkeypatch.setattr(torch.cuda, "device", enters)
    side = side_for(torch.device(source), torch.device(target))
    assert side is not None
    side.start(lambda: (), ())
    assert found == entered


class _OnCard(torch.Tensor):
    """A tensor that says it is a card's, and by which streams it is used."""

    is_cuda = True

    def record_stream(self, stream: _Stream) -> None:  # type: ignore[override]
        stream.log.append(f"{self.called} is used by {stream.name}")


def _on_card(name: str) -> torch.Tensor:
    made = torch.zeros(1).as_subclass(_OnCard)
    made.called = name  # type: ignore[attr-defined]
    return made


def _two_cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in the streams of two cards."""
    log: list[str] = []

    @contextmanager
    def enters(what: object) -> Iterator[None]:
        log.append(f"in {getattr(what, 'name', what)}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(log, f"side {device.index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(log, f"current {device.index}"))
    monkeypatch.setattr(torch.cuda, "stream", enters)
    monkeypatch.setattr(torch.cuda, "device", enters)
    return log


def test_streams_wait_both_ways_and_memory_is_kept_until_both_have_used_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _two_cards(monkeypatch)
    side = side_for(torch.device("cuda:0"), torch.device("cuda:1"))
    assert side is not None

    def task() -> list[torch.Tensor]:
        log.append("copies")
        return [_on_card("copy")]

    ticket = side.start(task, [_on_card("original")])
    ticket.arrive(torch.device("cuda:1"))
    assert log == [
        "side 0 waits",  # for what has been computed
        *("in cuda:0", "in side 1", "in side 0", "copies"),
        "side 0 waits",  # for the copy's end on the other card
        "current 1 waits for the event",
        "copy is used by current 1",
    ]


def test_what_a_card_sends_is_in_memory_until_its_computations_wait_for_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most messages of a step were there: what a side had used was free when the host had seen its end."""
    log = _two_cards(monkeypatch)
    side = side_for(torch.device("cuda:0"), torch.device("cuda:1"))
    assert side is not None
    alive: list[weakref.ref[Any]] = []
    for _ in range(5):
        sent = _on_card("original")
        alive.append(weakref.ref(sent.untyped_storage()))
        side.start(tuple, [sent])
        del sent
        held = [k for k, ref in enumerate(alive) if ref() is not None]
        assert held == list(range(len(alive)))[-2:]
        assert log.count("current 0 waits for the event") == len(alive) - len(held)
    side.settle()  # a run ends
    assert not any(ref() is not None for ref in alive)
    assert log.count("current 0 waits for the event") == 5
    side.start(tuple, [torch.zeros(1)])
    side.settle()
    assert log.count("current 0 waits for the event") == 5, "nothing of a card was sent"


def test_a_run_ends_with_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank lets go of what it has sent, both ways."""
    settled: list[str] = []
    monkeypatch.setattr(Link, "settle", lambda link: settled.append(threading.current_thread().name))
    x, y = batch()
    with trainer(model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH)), 3, microbatches=2) as t:
        t.forward_backward(x, y)
    assert sorted(name.split("_")[0] for name in settled) == ["spu cpu:0", "spu cpu:1", "spu cpu:1", "spu cpu:2"]


class _PageLocked(torch.Tensor):
    """The caller's own batch: `pin_memory` returns it itself."""

    def pin_memory(self, *_: object) -> torch.Tensor:  # type: ignore[override]
        return self


def test_a_card_reads_no_memory_of_the_callers_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that a stage of the CPU had handed on was read when the next batch was in its place."""
    make = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory: make(tensor))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)  # later, as the card does
    link = Link(torch.device("cuda:0"), None, HostSide())
    batch = torch.ones(4).as_subclass(_PageLocked)
    message = link.send(batch)
    arrived = message.arrive(CPU)
    batch.fill_(7.0)
    assert arrived.as_subclass(torch.Tensor).tolist() == [1.0] * 4
    link.close()


def test_between_cpus_and_within_a_card_the_sender_packs_by_itself() -> None:
    assert side_for(CPU, CPU) is None
    assert side_for(torch.device("cuda:0"), torch.device("cuda:0")) is None


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb"])
def test_a_pipeline_with_sides_trains_to_the_same_bits(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for make in (side_for, HostSide):
        monkeypatch.setattr(local, "side_for", make)
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8) for _ in range(4)]
        x, y = torch.randn(8, 8), torch.randint(8, (8,))
        with ModelParallelTrainer(
            layers, ["cpu:0", "cpu:1"], precision="fp32", schedule=schedule, microbatches=4, transfer="int8", lr=0.1
        ) as trainer:
            losses.append([trainer.step(x, y).loss for _ in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("direction", "kind"), [("forward", "F"), ("backward", "B")])
@pytest.mark.parametrize("end", ["send", "arrive", "unpack"])
def test_a_failing_transfer_stops_everything_and_names_the_action(
    direction: str, kind: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.randn(8, 4), torch.randint(4, (8,))
    with ModelParallelTrainer([nn.Linear(4, 4), nn.Linear(4, 4)], ["cpu:0", "cpu:1"], microbatches=8) as trainer:
        trainer.prepare(x, y)
        (link,) = getattr(trainer._runner.engine, f"_{direction}_links")
        real, calls, failed = getattr(link, end), [], []

        def fails(tree: object) -> object:
            calls.append(1)
            if len(calls) == 4:
                failed.append(time.perf_counter())
                raise ArithmeticError("a wire is cut")
            return real(tree)

        monkeypatch.setattr(link, end, fails)
        stage = int((direction == "forward") == (end != "send"))
        with pytest.raises(StageError, match=rf"stage {stage} .*action {stage}{kind}3, .*a wire is cut"):
            trainer.step(x, y)
        assert time.perf_counter() - failed[0] < 1.0
        assert all(p.grad is None for p in trainer.parameters())
        assert trainer.step(x, y).loss > 0
