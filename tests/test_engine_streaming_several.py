"""Several devices that stream: they take the stages in turn, with the bits of the resident run on the same devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_probe import measured_peaks
from pipelines import devices
from streamed_runs import Lazy, batches, make, model, trained
from torch import nn

from spu import ModelParallelTrainer
from spu.engine.streaming import Streaming
from spu.memory.host_store import HostStore
from spu.memory.streams import HostStreams


@pytest.mark.parametrize(
    ("residency", "settings", "how"),
    [
        ("streamed", {"precision": "fp16", "recompute": True, "max_grad_norm": 0.1}, {}),
        ("streamed", {"precision": "fp32", "recompute": False}, {"buffers": 1}),
        ("offloaded", {"precision": "bf16", "recompute": False, "max_grad_norm": 0.1}, {}),
        ("streamed", {"precision": "fp16", "recompute": True}, {"streams": HostStreams()}),
        ("offloaded", {"precision": "fp16", "recompute": True}, {"streams": HostStreams(), "buffers": 1}),
    ],
)
def test_two_devices_equal_the_resident_run(
    reference: None, monkeypatch: pytest.MonkeyPatch, residency: str, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    both = {"devices": devices(2), "virtual": 3, **settings}
    plain, own = model(), model()
    expected = trained(make(monkeypatch, plain, None, **both), plain)
    hosted = "streams" in how
    stores: list[Any] = [HostStore(None) if hosted else Lazy() for _ in range(2)]
    found = trained(make(monkeypatch, own, stores, residency, **both, **how), own)
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert hosted or all(store.read_bytes > 0 and store.closed for store in stores)


@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_reads_a_weight_once_and_on_one_device(
    reference: None, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    own, stores = model(), [Lazy() for _ in range(count)]
    each = {"devices": devices(count), "virtual": 6 // count, "precision": "fp32"}
    with make(monkeypatch, own, stores, **each) as trainer:
        x, y = batches(1)[0]
        trainer.step(x, y)
        trainer.evaluate(x, y)
        units = trainer._runner.updater.streaming.units  # type: ignore[union-attr]
        assert sum(len(store.regions) for store in stores) == sum(len(list(u.pieces)) for u in units.values())
        for store in stores:
            store.read_bytes = 0
        trainer.evaluate(x, y)
        # Of three stages in turn the second one is still in its slot, of six none.
        read = [k for k in units if count == 1 or k // count != 1]
        for rank, store in enumerate(stores):
            assert store.read_bytes == sum(units[k].weight_bytes for k in read if k % count == rank) > 0


def test_a_parameter_of_stages_on_several_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stages 0 and 5 share a parameter \(11, 16\), and are on several devices"):
        make(monkeypatch, model(tied=True), [Lazy(), Lazy()], devices=devices(2), virtual=3)


@pytest.mark.parametrize(
    "how",
    [
        {"residency": "streamed"},
        {"residency": "streamed", "activations": "int8", "recompute": True},
        {"residency": "offloaded"},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_the_peak_of_every_tier_is_the_predicted_one(how: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(400, 400), nn.GELU())))
    x, y = torch.randn(512, 400), torch.randint(400, (512,))
    settings = {"precision": "fp16", "microbatches": 4, "tiers": f"disk={tmp_path}:1GB", **how}
    with ModelParallelTrainer(wide, devices(2), **settings) as trainer:
        found = measured_peaks(trainer, (x, y))
        assert trainer.plan is not None
        assert trainer.plan.streaming is not None
        predicted = {tier.name: tier.peak_bytes for tier in trainer.plan.streaming.tiers}
    assert predicted["disk"] == found["disk"]
    for name in ("cpu:0", "cpu:1"):
        assert 0.95 * found[name] <= predicted[name] <= 1.15 * found[name], (name, found, predicted)


def test_what_an_update_needs_to_know_comes_from_the_stages_own_card() -> None:
    """found_inf and the clip factor lie on the card of the last stage. Copied from there, they would cross in a stream
    of that card, and the event of the stage's own streams would not tell when they have come: the host read the last
    step's.
    """
    own, other = torch.device("meta"), torch.device("cpu")  # two cards, and no streams of either
    copied: list[torch.Tensor] = []

    class Recorded(HostStreams):
        def copy(self, into: torch.Tensor, source: torch.Tensor, after: Any = ()) -> Any:
            copied.append(source)
            return super().mark()

    streaming = object.__new__(Streaming)
    stage = SimpleNamespace(device=SimpleNamespace(torch_device=own))
    streaming._built = SimpleNamespace(stages=[stage])  # type: ignore[assignment]
    streaming._optimizers = [SimpleNamespace(param_groups=[])]  # type: ignore[list-item]
    streaming._made, streaming._deferred, streaming._streams = {0: [True]}, {}, {0: Recorded()}
    streaming._scalars = {0: torch.zeros(2, 1)}
    streaming.defer(0, torch.zeros(1, device=other), torch.ones(1, device=other))
    assert [source.device for source in copied] == [own, own]
    assert [source.device for source in streaming._deferred[0].sources if source is not None] == [own, own]
