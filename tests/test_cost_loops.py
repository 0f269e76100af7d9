"""Layers that loop over tokens are counted on short rows: the costs of long ones, in a fraction of the operators."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from spu.cost import loops
from spu.cost.blueprint import blueprint, costs_by_rows
from spu.cost.footprint import Footprint
from spu.plan.layer_cost import LayerCost
from spu.settings import Settings

TOKENS = 32


@pytest.fixture
def mamba(tmp_path: Path) -> str:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=100, state_size=8)
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def costs(source: str) -> list[LayerCost]:
    return costs_by_rows(blueprint(source), TOKENS, Settings(precision="bf16"))(1)[0]


def test_a_recurrence_costs_what_its_whole_rows_cost(mamba: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a Mamba for 2,048 tokens took minutes: some hundred operators a token, each on fake tensors."""
    seen: list[tuple[int, ...]] = []
    run = Footprint.cost

    def noted(self: Footprint) -> tuple[LayerCost, object]:
        if self.layer.name.startswith("layers"):
            seen.append(tuple(self.x.shape))
        return run(self)

    monkeypatch.setattr(Footprint, "cost", noted)
    monkeypatch.setattr(loops, "MOST_OPERATORS", 500)
    short = costs(mamba)
    assert (4, 8, 64) in seen
    assert (2, 16, 64) in seen
    monkeypatch.setattr(loops, "MOST_OPERATORS", 1 << 30)
    for found, whole in zip(short, costs(mamba), strict=True):
        for field in dataclasses.fields(LayerCost):
            own, expected = getattr(found, field.name), getattr(whole, field.name)
            if type(expected) is int:
                assert own == pytest.approx(expected, rel=0.03, abs=4096), (whole.name, field.name)
            else:
                assert own == expected, (whole.name, field.name)


def test_rows_that_are_no_multiple_are_rounded_up(mamba: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "MOST_OPERATORS", 500)
    layers = blueprint(mamba)
    long, longer = (costs_by_rows(layers, tokens, Settings(precision="bf16"))(1)[0][1] for tokens in (45, 48))
    assert longer.output_bytes == long.output_bytes * 48 // 45
    assert long.own_bytes == pytest.approx(longer.own_bytes, rel=0.01)
