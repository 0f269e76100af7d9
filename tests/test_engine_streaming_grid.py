"""Every pair of residency, schedule, activations, state form and precision: streamed as resident, to the last bit.

What waits below in 8 or 4 bits is rounded: there the losses are near.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import devices
from streamed_runs import model

from spu import ModelParallelTrainer

pytestmark = pytest.mark.usefixtures("reference")

SCHEDULES = [("gpipe", 3), ("1f1b", 2), ("zbv", 2), ("layer_outer", 1)]  # of the resident run, and its devices
ACTIVATIONS = [("keep", False), ("keep", True), ("exact", True), ("fp16", True), ("int8", True), ("int4", True)]
STATES = ["fp32", "exact", "compact"]


def cases() -> list[tuple[Any, ...]]:
    """All pairs of schedule and activations; the rest turn at other paces, so that each two values meet."""
    found = []
    for i, schedule in enumerate(SCHEDULES):
        for j, activations in enumerate(ACTIVATIONS):
            residency = ("streamed", "offloaded")[(i + j) % 2]
            state, precision = STATES[(i + j // 2) % 3], ("fp16", "bf16")[(i // 2 + j) % 2]
            found.append((*schedule, *activations, residency, state, precision))
    return found


CASES = cases()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of 64 rows: packing fewer values would not make them smaller, and changes no bit."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 11, (2, 64, 5), generator=generator)) for _ in range(2)]  # type: ignore[misc]


def trained(trainer: ModelParallelTrainer) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and norms of two steps and of an evaluation after each; then all weights and buffers."""
    seen = []
    with trainer:
        for x, y in batches():
            result = trainer.step(x, y)
            seen += [result.loss, result.grad_norm, trainer.evaluate(x, y)]
        return seen, list(trainer.state_dict_for_model().values())


@functools.cache
def resident(schedule: str, ranks: int, state: str, precision: str) -> tuple[list[float], list[torch.Tensor]]:
    how: dict[str, Any] = {"state": state, "precision": precision, "microbatches": 4, "lr": 1e-2}
    return trained(ModelParallelTrainer(model(), devices(ranks), schedule=schedule, max_grad_norm=0.5, **how))


@pytest.mark.parametrize(
    ("schedule", "ranks", "activations", "recompute", "residency", "state", "precision"),
    CASES,
    ids=["-".join(map(str, case)) for case in CASES],
)
def test_equals_the_resident_run(
    schedule: str, ranks: int, activations: str, recompute: bool, residency: str, state: str, precision: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    expected, weights = resident(schedule, ranks, state, precision)
    how: dict[str, Any] = {"state": state, "precision": precision, "microbatches": 4, "lr": 1e-2}
    how |= {"residency": residency, "activations": activations, "recompute": recompute, "max_grad_norm": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a folder that is not read around the system's cache
        trainer = ModelParallelTrainer(model(), devices(1), tiers=f"disk={tmp_path}:1GB", **how)
        found, others = trained(trainer)
    streaming = trainer.plan.streaming  # type: ignore[union-attr]
    assert streaming is not None
    assert set(streaming.residency) == {residency}
    assert streaming.activations == activations
    if activations in ("keep", "exact", "fp16"):  # 16 bits are not made smaller by being packed in fp16
        assert found == expected
        assert all(torch.equal(a, b) for a, b in zip(others, weights, strict=True))
    else:
        assert found[::3] == pytest.approx(expected[::3], rel=0.02)
        assert found != expected


def test_every_two_values_meet() -> None:
    columns = [{case[at] for case in CASES} for at in (0, 2, 4, 5, 6)]
    for a, b in ((0, 2), (0, 4), (0, 5), (0, 6), (2, 4), (2, 5), (2, 6), (4, 5), (4, 6), (5, 6)):
        met = {(case[a], case[b]) for case in CASES}
        order = {0: 0, 2: 1, 4: 2, 5: 3, 6: 4}
        assert len(met) == len(columns[order[a]]) * len(columns[order[b]]), (a, b)
