"""No step on a card makes the host wait: neither for a value, nor for a copy.

Meta tensors stand for a card's: they run the whole engine on a machine without one, refuse to give values, and are on
another device than the host's tensors, so that each copy between the two shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spu
from spu.devices.manager import Device
from spu.engine.channel import Exchange
from spu.engine.local import Worker
from spu.engine.skips import StageSkips
from spu.ops.reference import codec

CARD = torch.device("meta")
_READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero}


class Waits(TorchDispatchMode):
    """Notes operators for which the host would wait for a card."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports all of Dynamo first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = {a.device.type for a in args if isinstance(a, Tensor)}
        if func.overloadpacket in _READS and CARD.type in places:
            self.found.append(f"{func} reads a value of a card")
            return torch.zeros(args[0].shape).item() if args[0].numel() == 1 else func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten._to_copy:
            places.add(torch.device(kwargs.get("device") or args[0].device).type)
        # To the host a copy must have arrived before it is read; from pageable memory the driver takes it at once.
        blocking = not (kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,)))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(places) > 1 and blocking:
            self.found.append(f"{func} of {tuple(args[0].shape)} waits between {' and '.join(sorted(places))}")
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    found: list[str] = []
    submit = Worker.submit

    def watched(task: Callable[..., Any], *args: Any) -> Any:
        with Waits(found):
            return task(*args)

    monkeypatch.setattr(
        Worker, "submit", lambda self, task, *args: submit(self, functools.partial(watched, task), *args)
    )
    with Waits(found):
        yield found


def cards(count: int) -> list[Device]:
    return [Device(f"cuda:{i}", CARD, (), 1, 1 << 34, 1 << 34, "a card") for i in range(count)]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 11))


def test_a_wait_is_found(waits: list[str]) -> None:
    card = torch.zeros(1, device=CARD)
    card + torch.ones(1).to(CARD, non_blocking=True)
    assert waits == []
    torch.ones(1).to(CARD)
    card.copy_(torch.ones(1))
    card.item()
    assert [text.split()[0] for text in waits] == [
        "aten._to_copy.default",
        "aten.copy_.default",
        "aten._local_scalar_dense.default",
    ]


@pytest.mark.parametrize(
    ("precision", "devices", "loss"),
    [
        ("fp16", 1, None),
        ("fp32", 2, F.cross_entropy),
        ("fp16", 2, nn.CrossEntropyLoss(weight=torch.ones(11))),
        ("fp32", 1, nn.CrossEntropyLoss(weight=torch.ones(11), label_smoothing=0.1)),
    ],
)
def test_a_step_waits_for_no_card(precision: str, devices: int, loss: Any, waits: list[str]) -> None:
    tokens, targets = torch.randint(11, (8,)), torch.randint(11, (8,))
    layers = model()
    first = list(layers.parameters())  # a move to meta makes others, which must not have the identity of one of these
    with spu.ModelParallelTrainer(
        layers,
        cards(devices),
        lr=1e-3,
        precision=precision,
        microbatches=2,
        accumulate=2,
        max_grad_norm=1.0,
        loss_fn=loss,
    ) as trainer:
        trainer.prepare(tokens, targets)
        waits.clear()
        for _ in range(2):
            result = trainer.step(tokens, targets)
        assert waits == []
        parts = (result.loss_tensor, result.grad_norm_tensor, result.loss_scale_tensor, result.found_inf_tensor)
        assert {part.device for part in parts} == {CARD}
        assert trainer.scaler.device == CARD
    del first


def test_a_wire_and_a_skip_to_a_card_wait_for_nothing(waits: list[str]) -> None:
    """The reference's header, and what a stage on a CPU had stashed, waited for all that the card had queued."""
    codec.pack(torch.zeros(100, device=CARD), "int8")
    exchange = Exchange()
    here, there = (StageSkips(exchange, 0, torch.device(kind), train=True) for kind in ("cpu", CARD))
    here.stash("x", torch.ones(3, requires_grad=True) * 1.0)
    here.send()
    assert there.pop("x").device == CARD
    assert waits == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_torch_sees_no_wait_in_a_step_on_a_card(precision: str) -> None:
    layers = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    tokens, targets = torch.randint(64, (16,)), torch.randint(64, (16,))
    with spu.ModelParallelTrainer(
        layers, ["cuda:0"], lr=1e-3, precision=precision, microbatches=2, max_grad_norm=1.0
    ) as trainer:
        first = trainer.step(tokens, targets).loss  # compiles, and makes the optimizer's state
        trainer.step(tokens, targets)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [trainer.step(tokens, targets) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert results[-1].loss < first
