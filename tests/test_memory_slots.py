"""The ring of slots, packed activations, and stores that fail."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_store import FakeStore
from numeric import assert_equal
from parking import Fn, activations_in, decoder, parked, results, token_loss, tokens
from pipelines import WIDTH, batch, model_of, trainer
from torch import nn

from spu import StageError
from spu.common.codecs import parked_bytes
from spu.memory.host_store import HostStore
from spu.memory.slab import aligned
from spu.memory.slots import Homes, Ring
from spu.memory.store import StoreError

pytestmark = pytest.mark.usefixtures("reference")


def test_the_ring_does_not_grow_and_reads_are_ahead() -> None:
    store = FakeStore(seconds=0.001)
    x, y = batch()
    model = model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    with trainer(model, 1, schedule="layer_outer", virtual=5, recompute=True) as t:
        t.prepare(x, y)
        with parked(t, store) as activations:
            ring = activations._way
            assert isinstance(ring, Ring)
            first = sorted(slot.buffer.data_ptr() for slot in ring._slots)
            for _ in range(3):
                t.forward_backward(x, y)
            assert sorted(slot.buffer.data_ptr() for slot in ring._slots) == first
            assert len(first) == 3
            assert activations.slot_bytes == 3 * (1 << 14)
    # every input is written once and read at most once; what is still in the ring when it is needed is not read
    assert store.counts["write"] == 3 * 3 * 4
    assert store.counts["write"] - 3 * 3 <= store.counts["read"] <= store.counts["write"]


def test_reads_begin_before_they_are_needed() -> None:
    store = FakeStore()
    activations = activations_in(store, [4096] * 8)
    places = [activations.park((1, index, 0), [torch.full((8,), float(index))], [True], 0) for index in range(6)]
    assert store.counts["read"] == 0
    for index, place in enumerate(places):
        assert place is not None
        assert torch.equal(place.tensors()[0], torch.full((8,), float(index)))
        started = store.counts["read"]
        activations.release(1, index)
        assert store.counts["read"] == started + (index < 3)  # one that comes after the two that are there
    assert store.counts["read"] <= 6


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("when", [0, 5, 15])
def test_a_store_that_fails_stops_the_stage_and_the_next_step_is_right(kind: str, when: int) -> None:
    x, y = batch()
    model = model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    expected, _, plan = results(model, x, y, None, steps=1)
    broken = True
    store = FakeStore(seconds=0.001, fail=lambda what, count: broken and what == kind and count == when)
    with trainer(model, 1, schedule="layer_outer", virtual=5, recompute=True, plan=plan) as t:
        t.prepare(x, y)
        with parked(t, store) as activations:
            with pytest.raises(StageError, match="no space left on the fake device") as caught:
                for _ in range(2):  # a step reads less than it writes
                    t.forward_backward(x, y)
            assert isinstance(caught.value.__cause__, StoreError)
            assert not store.busy
            assert not activations._records
            broken = False
            loss, _ = t.forward_backward(x, y)
    assert_equal(loss, expected[0], "the loss afterwards")
    for parameter, theirs in zip(model.parameters(), expected[1:], strict=True):
        assert parameter.grad is not None
        assert_equal(parameter.grad, theirs, "a gradient afterwards")


@pytest.mark.parametrize(("codec", "most"), [("fp16", 0.57), ("int8", 0.45), ("int4", 0.25)])
def test_packed_activations(codec: str, most: float) -> None:
    """The forward is exact; gradients come from a layer that was run again on rounded inputs."""
    x, y = tokens(rows=32, length=128)
    kept, _, plan = results(decoder(), x, y, None, loss_fn=token_loss, steps=1)
    how = {"codec": codec, "size": 1 << 16}
    ours, counts, _ = results(decoder(), x, y, FakeStore(), loss_fn=token_loss, steps=1, how=how, plan=plan)
    assert_equal(ours[0], kept[0], "loss")
    assert counts.kept == 0
    assert counts.stored < most * counts.parked
    changed = 0
    for a, b in zip(ours[1:], kept[1:], strict=True):
        changed += not torch.equal(a, b)
        assert (a - b).norm() <= {"fp16": 0.002, "int8": 0.03, "int4": 0.3}[codec] * b.norm()
    assert changed > 10


def test_packed_training_comes_as_far() -> None:
    x, y = tokens(rows=8, length=8)
    y = (x * 3 + 1) % 11
    losses = {}
    for codec in (None, "int8"):
        own = decoder(1)
        how = {"schedule": "layer_outer", "virtual": 3, "recompute": True, "microbatches": 2, "lr": 3e-3}
        with trainer(own, 1, loss_fn=token_loss, **how) as t:
            t.prepare(x, y)
            with parked(t, FakeStore(), codec):
                for _ in range(15):
                    result = t.step(x, y)
                losses[codec] = float(result.loss)
    assert 0.2 < losses[None] < 1.8  # from 2.5
    assert losses["int8"] != losses[None]
    assert abs(losses["int8"] - losses[None]) <= 0.005 * losses[None]


def chosen(x: torch.Tensor) -> torch.Tensor:
    return (x.sum(1) * 1e4).remainder(2) > 1


def summed(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x * 3, x[chosen(x)].sin().sum(0, keepdim=True).expand_as(x)], 1)


def put(x: torch.Tensor) -> torch.Tensor:
    """Here autograd, and not the checkpoint, sees that the second run has chosen other rows."""
    y = x * 3
    y[chosen(x)] = x[chosen(x)] * 2
    return torch.cat([y, x], 1)


@pytest.mark.parametrize("keeps", [summed, put])
def test_shapes_that_depend_on_values_are_refused_where_they_change(keeps: Callable[..., torch.Tensor]) -> None:
    x, y = batch(rows=32)
    model = model_of(nn.Tanh(), Fn(keeps), nn.Linear(2 * WIDTH, WIDTH))
    expected, _, plan = results(model, x, y, None, steps=1)
    exact, counts, _ = results(model, x, y, FakeStore(), steps=1, plan=plan)
    assert counts.parked > 0
    assert all(torch.equal(a, b) for a, b in zip(exact, expected, strict=True))
    with pytest.raises(StageError, match="waited packed as int8; use activations='exact'"):
        results(model, x, y, FakeStore(), steps=1, plan=plan, how={"codec": "int8"})


def test_what_cannot_be_packed_is_exact() -> None:
    """Infinite values, masks, wide dtypes, and tensors that a codec would not make smaller."""
    activations = activations_in(FakeStore(), [1 << 17] * 8, "int8")
    wide = torch.randn(64, 64)
    infinite = wide.clone()
    infinite[3, 4] = torch.inf
    tensors = [wide, infinite, wide.double(), wide[:2, :2].contiguous(), wide > 0, wide]
    place = activations.park((1, 0, 0), tensors, [False] * 5 + [True], 0)
    assert place is not None
    found = place.tensors()
    assert not torch.equal(found[0], wide)
    assert (found[0] - wide).abs().max() <= wide.abs().max() / 254
    for a, b in zip(found[1:], tensors[1:], strict=True):
        assert_equal(a, b, "an exact one")
    again = place.tensors()
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert again[1].data_ptr() != found[1].data_ptr()
    activations.release(1, 0)
    assert len(activations._free) == 8


def test_an_input_with_a_tensor_of_another_device_stays() -> None:
    """What a layer on a card had made on the host came back on the card."""
    activations = activations_in(FakeStore(), [1 << 14])
    own, other = torch.zeros(8), torch.zeros(4, device="meta")
    assert activations.park((0, 0, 0), [own, other], [True, True], 0) is None
    assert activations.counts.kept == 48
    assert activations.park((0, 0, 0), [own], [True], 0) is not None


@pytest.mark.parametrize("codec", [None, "int8", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_strides_and_sizes(codec: str | None, dtype: torch.dtype) -> None:
    base = torch.randn(7, 130, 66).to(dtype)
    for tensor in (
        base,
        base.transpose(0, 2),
        base[:, 1:65],
        base[2:5, ::3],
        base[0, 0, 0],
        base.permute(2, 0, 1)[::2],
    ):
        size = parked_bytes(tensor.numel(), tensor.element_size(), codec)
        activations = activations_in(FakeStore(), [size], codec)
        place = activations.park((0, 0, 0), [tensor], [False], 0)
        assert place is not None, "the region is as large as was said"
        assert activations.counts.stored <= aligned(size)
        (found,) = place.tensors()
        assert (found.shape, found.stride(), found.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        if codec is None or (codec == "fp16" and dtype != torch.float32):
            assert_equal(found, tensor, "as it was")
        else:
            torch.testing.assert_close(found.float(), tensor.float(), rtol=0.01, atol=0.05)


def test_bytes() -> None:
    few = 1024  # for headers and padding
    assert parked_bytes(1000, 4, None) == 4032 + few
    assert parked_bytes(1000, 2, "fp16") == 2048 + few  # as it is: packed it would be 64 bytes more
    assert parked_bytes(1024, 4, "int8") == 64 + 64 + 1024 + few


@pytest.mark.parametrize("codec", [None, "int8"])
def test_an_input_of_several_tensors_has_room(codec: str | None) -> None:
    """Even where the values alone fill the region."""
    tensors = [torch.randn(numel) for numel in (3, 1, 5131, 1000, 7, 2)]
    assert sum(map(len, tensors)) * 4 == 6 * 4096
    activations = activations_in(FakeStore(), [parked_bytes(6 * 1024, 4, codec)], codec)
    place = activations.park((0, 0, 0), tensors, [False] * 6, 0)
    assert place is not None
    assert [found.shape for found in place.tensors()] == [tensor.shape for tensor in tensors]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown codec 'int3'"):
        activations_in(FakeStore(), [1], "int3")
    with pytest.raises(ValueError, match=r"cuda:0 wait in the host's memory: give a HostStore"):
        activations_in(FakeStore(), [1], device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match="got none"):
        activations_in(FakeStore(), [])


class _Late:
    """A card's side: it copies when something waits for that, in the order in which it was asked to.

    What it is given, it would keep until the host has seen the copy's end, long after the card's.
    """

    def __init__(self) -> None:
        self.queued: list[_Copy] = []

    def start(self, task: Callable[[], Any], given: Any) -> _Copy:
        assert given == (), "memory of the stream that computes is no other stream's"
        self.queued.append(_Copy(self, task))
        return self.queued[-1]

    def close(self) -> None:
        pass


class _Copy:
    def __init__(self, side: _Late, task: Callable[[], Any]) -> None:
        self.side, self.task, self.made = side, task, None

    def arrive(self, target: torch.device) -> Any:
        while self in self.side.queued:
            first = self.side.queued.pop(0)
            first.made, first.task = first.task(), None  # type: ignore[misc,assignment]
        return self.made


def test_a_card_far_behind_its_host_holds_as_many_inputs_as_were_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a whole step were in its memory: it was kept from use until the host had seen the ends of copies."""
    store, side, memory = HostStore(), _Late(), list[str]()
    monkeypatch.setattr("spu.memory.activations.side_for", lambda *_: side)
    activations = activations_in(store, [4096] * 6)
    assert isinstance(activations._way, Homes)
    alive: list[weakref.ref[Any]] = []
    places = []
    for index in range(6):
        tensor = torch.full((8,), float(index))
        alive.append(weakref.ref(tensor.untyped_storage()))
        places.append(activations.park((1, index, 0), [tensor], [True], 0))
        del tensor
        held = [k for k, ref in enumerate(alive) if ref() is not None]
        assert held == list(range(max(0, index - 1), index + 1))
        assert len(side.queued) == len(held), "the memory of others may be used again: their copies have ended"
    make = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: memory.append("made") or make(*a, **k))
    for index, place in enumerate(places):
        assert place is not None
        assert torch.equal(place.tensors()[0], torch.full((8,), float(index)))
        assert not any(ref() is not None for ref in alive), "the forward's have gone"
        assert len(memory) == min(index + 2, 6), "this one's and the next one's, before they are copied"
        activations.release(1, index)
    assert not side.queued
    store.close()


def test_memory_of_an_input_that_is_not_needed_is_used_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    store, side = HostStore(), _Late()
    monkeypatch.setattr("spu.memory.activations.side_for", lambda *_: side)
    activations = activations_in(store, [4096] * 3)
    first, *_ = [activations.park((1, index, 0), [torch.ones(8)], [True], 0) for index in range(3)]
    assert first is not None
    first.tensors()
    assert len(side.queued) == 1  # the next one is on its way
    activations.release(1, 1)
    assert not side.queued
    store.close()
