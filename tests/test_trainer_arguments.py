"""What is said of arguments that work, and not well."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_devices import GB, play_cpu, play_gpus

from spu.devices.tiers import Tiers
from spu.settings import TrainSettings
from spu.trainer.distributed import placed


@pytest.mark.parametrize(("precision", "named"), [("bf16", ["cuda:1"]), ("fp16", []), ("fp32", [])])
def test_a_card_without_bf16_is_named(precision: str, named: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a card of compute capability 7.5 has it, and emulates it."""
    play_cpu(monkeypatch, 4)
    play_gpus(monkeypatch, ("A", 8 * GB, 8 * GB), ("B", 8 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: [(8, 6), (7, 5)][place.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        placed("cuda:0,cuda:1,cpu", TrainSettings(precision=precision), Tiers())
    texts = [str(each.message) for each in found]
    assert [text.split()[0] for text in texts if "has no bf16 (compute capability 7.5" in text] == named
