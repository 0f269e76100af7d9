"""Updates by the host beside a device, with a CPU in the device's place: the same bits as in a resident run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import reference
from test_engine_streaming import MIXED, MIXED_TIE, Lazy, make, model, trained

from spu.memory.host_store import HostStore
from spu.memory.streams import HostStreams

__all__ = ["reference"]


@pytest.mark.parametrize(
    ("below", "precision", "recompute", "residency", "slots", "buffers", "tied", "clip"),
    [
        ("host", "fp16", True, "streamed", 2, 2, False, None),
        ("host", "fp16", False, "streamed", 2, 1, True, None),
        ("disk", "bf16", False, "streamed", 3, 2, True, 0.1),
        ("disk", "bf16", True, "streamed", 2, 1, True, 0.1),
        ("host", "fp32", False, "streamed", 2, 2, False, 0.1),
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
    plain, own = model(tied), model(tied)
    expected = trained(make(monkeypatch, plain, None, **settings), plain)
    store: Any = HostStore() if below == "host" else Lazy()
    how = {"slots": slots, "buffers": buffers, "streams": HostStreams()}
    found = trained(make(monkeypatch, own, store, residency, **how, **settings), own)
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
