"""A real shortage: a process under a hard limit trains on with smaller microbatches; and streamed models do so too."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_equal
from starved import Starved, is_real, starve
from streamed_runs import batches
from torch import nn

from spu import ModelParallelTrainer

LIMITED = """
import json, sys, warnings
import torch
from torch import nn
from spu import ModelParallelTrainer

microbatches = int(sys.argv[1])
torch.manual_seed(0)
wide = nn.Sequential(nn.Linear(8, 4096), nn.GELU(), nn.Linear(4096, 8))
model = nn.Sequential(wide, nn.Linear(8, 8))
generator = torch.Generator().manual_seed(1)
batches = [(torch.randn(1 << 13, 8, generator=generator), torch.randint(8, (1 << 13,), generator=generator))
           for _ in range(2)]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    settings = {"precision": "fp32", "microbatches": microbatches, "recompute": True}
    with ModelParallelTrainer(model, "cpu", **settings) as trainer:
        results = [trainer.step(*batch) for batch in batches]
        state = trainer.state_dict_for_model()
said = [str(warning.message) for warning in told if "out of memory" in str(warning.message)]
print(json.dumps({
    "losses": [r.loss for r in results], "norms": [r.grad_norm for r in results],
    "sums": [v.double().sum().item() for v in state.values()],
    "microbatches": trainer.plan.settings.microbatches, "said": said,
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the process's data")
def test_under_a_hard_limit_the_losses_are_those_of_a_run_planned_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """8192 rows in two microbatches need 64 MiB for one activation of 4096 features, and several at a time."""
    from hard_limit import run_limited  # which other systems cannot import

    run = run_limited(LIMITED, headroom_bytes=300 << 20, arguments=["2"])
    assert run.code == 0, run.errors
    limited: dict[str, Any] = json.loads(run.output.splitlines()[-1])
    assert limited["microbatches"] > 2
    assert "can't allocate memory" in limited["said"][0]
    torch.set_num_threads(2)  # as there
    monkeypatch.setattr(sys, "argv", ["free", str(limited["microbatches"])])
    exec(LIMITED, {})
    free = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert free["said"] == []
    assert [limited[key] for key in ("losses", "norms", "sums")] == [free[key] for key in ("losses", "norms", "sums")]


def model(**limits: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 16), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1)), Starved(**limits),
                         nn.Linear(16, 11))  # fmt: skip


def streamed(own: nn.Module, folder: Path, **settings: Any) -> tuple[list[float], dict[str, Any], ModelParallelTrainer]:
    settings = {"precision": "fp16", "residency": "streamed", "lr": 1e-2, "max_grad_norm": 0.5} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with ModelParallelTrainer(own, "cpu", tiers=f"disk={folder}:1GB", **settings) as trainer:
            losses = [trainer.step(x, y).loss for x, y in batches(3)]
            return losses, trainer.state_dict_for_model(), trainer


@pytest.mark.parametrize(
    ("limits", "first", "then"),
    [
        ({"rows": 2}, {"microbatches": 2, "recompute": True}, {"microbatches": 4, "recompute": True}),
        ({"backward_rows": 2}, {"microbatches": 2, "recompute": True}, {"microbatches": 4, "recompute": True}),
        ({"graphs": 1}, {"microbatches": 2, "activations": "keep"}, {"microbatches": 2, "recompute": True}),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_streamed_model_goes_on_with_less(
    tmp_path: Path, limits: dict[str, int], first: dict[str, Any], then: dict[str, Any]
) -> None:
    expected, weights, _ = streamed(model(), tmp_path, **{"activations": "keep"} | then)
    found, others, trainer = streamed(model(**limits), tmp_path, **{"activations": "keep"} | first)
    assert trainer.plan is not None
    assert trainer.plan.streaming is not None
    assert trainer.plan.settings.microbatches == then["microbatches"]
    assert trainer.plan.recompute
    assert found == expected
    for name, weight in weights.items():
        assert_equal(others[name], weight, name)


class FailsAtFirst(nn.Module):
    """A linear layer whose first forwards, or backwards, fail for want of memory."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(16, 16), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and is_real(x) and x.requires_grad and torch.is_grad_enabled() and self.times:
            self.times -= 1
            starve()
        return self.linear(x)


def short_model(times: int) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1))
    return nn.Sequential(nn.Embedding(11, 16), middle, FailsAtFirst(times), nn.Linear(16, 11))


@pytest.mark.parametrize(
    ("times", "first", "notches"),
    [
        (2, {"residency": "streamed"}, ['activations="exact"', "microbatches=4"]),
        (2, {"residency": "auto"}, ['residency="streamed"', 'activations="exact"']),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_the_tier_below_is_used_before_microbatches_are_made_smaller(
    tmp_path: Path, times: int, first: dict[str, Any], notches: list[str]
) -> None:
    settings = {"precision": "fp16", "lr": 1e-2, "max_grad_norm": 0.5, "recompute": True, "microbatches": 2}
    smaller = 4 if "microbatches=4" in notches else 2
    runs = []
    plain = {"microbatches": smaller, "residency": "resident"}
    for own, changed in ((short_model(0), plain), (short_model(times), first | {"tiers": f"disk={tmp_path}:1GB"})):
        said: list[str] = []
        how = settings | changed | {"report": said.append}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with ModelParallelTrainer(own, "cpu", **how) as trainer:
                losses = [trainer.step(x, y).loss for x, y in batches(4)]
                trainer.flush()
                runs.append((losses, trainer.state_dict_for_model()))
    (expected, weights), (found, others) = runs
    assert [text.split("from now on ")[1].split(",")[0] for text in said if "from now on" in text] == notches
    assert trainer.plan is not None
    assert trainer.plan.streaming is not None
    assert trainer.plan.streaming.activations == "exact"
    assert trainer.plan.settings.microbatches == smaller
    assert found == expected
    for name, weight in weights.items():
        assert_equal(others[name], weight, name)


def test_a_tier_without_room_is_advice_and_the_next_notch_is_taken(tmp_path: Path) -> None:
    own, said = short_model(1), []
    settings = {"precision": "fp16", "recompute": True, "microbatches": 2, "tiers": f"disk={tmp_path}:8KB"}
    with ModelParallelTrainer(own, "cpu", report=said.append, **settings) as trainer, pytest.warns(RuntimeWarning):
        trainer.step(*batches(1)[0])
    assert trainer.plan is not None
    assert trainer.plan.streaming is None
    assert trainer.plan.settings.microbatches == 4
