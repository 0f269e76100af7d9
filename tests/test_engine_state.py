"""What checkpoints hold: masters in full, another precision, and what optimizers keep in their groups."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_equal
from pipelines import batch, model_of
from pipelines import trainer as trainer_of
from torch import nn

from spu import ModelParallelTrainer
from spu.checkpoint.writing import CheckpointError, Stored
from spu.optim.adamw import AdamW

pytestmark = pytest.mark.usefixtures("one_thread")


def make(model: nn.Module, stages: int = 2, **settings: Any) -> ModelParallelTrainer:
    return trainer_of(model, stages, microbatches=2, **settings)


def test_a_16_bit_model_resumes_bit_identically(tmp_path: Path) -> None:
    """A model that was fp16 from the start had no master before its first step: load() failed."""
    start = model_of(nn.LayerNorm(16)).half()
    with make(copy.deepcopy(start), precision="fp16", lr=0.01) as trainer:
        for _ in range(3):
            trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        expected = [trainer.step(*batch()).loss for _ in range(3)]
    with make(copy.deepcopy(start), precision="fp16", lr=0.01) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert [trainer.step(*batch()).loss for _ in range(3)] == expected


def test_masters_hold_what_another_16_bit_type_rounds() -> None:
    """An fp16 model trained in bf16 started from masters that had been through bf16."""
    model = model_of().half()
    exact = model[0].weight.detach().float().clone()
    with make(model, precision="bf16") as trainer:
        trainer.prepare(*batch())
        assert_equal(trainer.state_dict_for_model()["0.weight"], exact)


@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_a_checkpoint_loads_into_another_precision(tmp_path: Path, saved: str, loaded: str) -> None:
    """A precision without a loss scale saved an empty scaler, and load() failed on it half-way."""
    with make(model_of(), precision=saved, lr=0.01) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        state = trainer.state_dict_for_model()
    with make(model_of(), precision=loaded, lr=0.01) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert trainer.steps_done == 1
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, state[name], name)
        assert not trainer.step(*batch()).skipped


class Grouped(torch.optim.SGD):
    """Keeps its rate's growth in the group, and a text with each parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["growth"] = group.get("growth", 1.0) * 1.5
            group["weight_decay"] += 0.1
            for parameter in group["params"]:
                self.state[parameter]["phase"] = "warm"
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] * group["growth"])


def test_what_an_optimizer_keeps_in_its_groups_is_saved(tmp_path: Path) -> None:
    """Only tensors and numbers of single parameters were: a resumed run went on with other steps."""
    with make(model_of(), optimizer=Grouped, lr=0.01) as trainer:
        for _ in range(2):
            trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        expected = [trainer.step(*batch()).loss for _ in range(3)]
    for stages in (2, 1):
        with make(model_of(), stages, optimizer=Grouped, lr=0.01) as trainer:
            trainer.prepare(*batch())
            trainer.load(tmp_path / "checkpoint")
            inner = trainer._prepared().updater.optimizers[0].optimizer
            assert inner.param_groups[0]["growth"] == 1.5**2
            assert inner.state[inner.param_groups[0]["params"][0]]["phase"] == "warm"
            assert [trainer.step(*batch()).loss for _ in range(3)] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_says_which_optimizer_it_is_of_and_what_it_cannot_hold(tmp_path: Path) -> None:
    """Another optimizer's state was taken without a word, an object of its own left out."""
    with make(model_of(), optimizer=Grouped, lr=0.01) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        optimizer = trainer._prepared().updater.optimizers[0].optimizer
        optimizer.state[optimizer.param_groups[0]["params"][0]]["past"] = [torch.zeros(2)]
        with pytest.raises(CheckpointError, match="Grouped keeps 0.weight/past as a list"):
            trainer.save(tmp_path / "other")
    with make(model_of()) as trainer:
        trainer.prepare(*batch())
        with pytest.raises(CheckpointError, match="optimizer is Grouped, this one AdamW"):
            trainer.load(tmp_path / "checkpoint")


def test_groups_that_differ_by_stage_go_on_in_the_same_stages_only(tmp_path: Path) -> None:
    """One stage's step size would have become another's."""
    with make(model_of(), optimizer=Grouped, lr=0.01) as trainer:
        trainer.step(*batch())
        trainer._prepared().updater.optimizers[1].param_groups[0]["growth"] = 7.0
        trainer.save(tmp_path / "checkpoint")
        trainer.load(tmp_path / "checkpoint")
        assert [o.param_groups[0]["growth"] for o in trainer._prepared().updater.optimizers] == [1.5, 7.0]
    with make(model_of(), 1, optimizer=Grouped, lr=0.01) as trainer:
        trainer.prepare(*batch())
        with pytest.raises(CheckpointError, match="growth, weight_decay in each of 2 stages"):
            trainer.load(tmp_path / "checkpoint")


def decay_groups(kind: Any) -> Any:
    """As many loops make them: matrices decay, the rest does not, and a group without parameters is left out."""

    def factory(parameters: Any) -> torch.optim.Optimizer:
        own = list(parameters)
        groups = [
            {"params": [p for p in own if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0},
        ]
        return kind([group for group in groups if group["params"]], lr=0.05)  # type: ignore[no-any-return]

    return factory


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False))


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize(("before", "after"), [(4, 1), (2, 4), (1, 3)])
def test_decay_groups_go_on_with_other_stages(tmp_path: Path, kind: Any, before: int, after: int) -> None:
    """Stages with other groups than the first were refused elsewhere, though the factory makes the same values anew."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 6, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(6)]
    plain = tower()
    optimizer = decay_groups(torch.optim.AdamW)(plain.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    path = tmp_path / "checkpoint"
    with make(tower(), before, optimizer=decay_groups(kind)) as trainer:
        for x, y in batches[:3]:
            trainer.step(x, y)
        trainer.save(path)
    with make(tower(), after, optimizer=decay_groups(kind)) as trainer:
        trainer.prepare(*batches[0])
        trainer.load(path)
        for x, y in batches[3:]:
            trainer.step(x, y)
        for name, value in trainer.state_dict_for_model().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_rate_that_was_changed_in_all_groups_goes_on_in_other_stages(tmp_path: Path) -> None:
    x, y = torch.randn(4, 6), torch.randint(4, (4,))
    path = tmp_path / "checkpoint"
    with make(tower(), 4, optimizer=decay_groups(AdamW)) as trainer:
        trainer.step(x, y)
        for optimizer in trainer._prepared().updater.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
        trainer.save(path)
    with make(tower(), 1, optimizer=decay_groups(AdamW)) as trainer:
        trainer.prepare(x, y)
        trainer.load(path)
        groups = trainer._prepared().updater.optimizers[0].param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.5), (0.01, 0.0)]
        groups[0]["lr"] = 0.02  # now one group's own
        trainer.save(path)
    with make(tower(), 4, optimizer=decay_groups(AdamW)) as trainer:
        trainer.prepare(x, y)
        with pytest.raises(CheckpointError, match="2 parameter groups with values of their own.*and 1 in stage 0"):
            trainer.load(path)


@pytest.mark.parametrize("after", [1, 5, 9])
@pytest.mark.parametrize("optimizer", [AdamW, torch.optim.Adam])
def test_a_load_that_fails_in_the_middle_leaves_nothing_to_train_on(
    optimizer: Any, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of two steps were trained on, evaluated and saved over the good checkpoint, without a word."""
    reads = []
    with make(model_of(), optimizer=optimizer, lr=0.1) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        good = trainer.state_dict_for_model()
        trainer.step(*batch())

        def failing(file: Any, piece: memoryview) -> int:
            reads.append(1)
            if len(reads) > after:
                raise OSError(5, "Input/output error")
            return file.readinto(piece)

        read = Stored.read
        with monkeypatch.context() as patch:
            patch.setattr(
                Stored, "read", lambda self: read(dataclasses.replace(self, file=FailingFile(self.file, failing)))
            )
            with pytest.raises(CheckpointError, match="tensors.safetensors: reading tensor .* failed: .*Input/output"):
                trainer.load(tmp_path / "checkpoint")
        calls = [trainer.step, trainer.forward_backward, trainer.evaluate]
        for call in [*(functools.partial(c, *batch()) for c in calls), trainer.replan, trainer.state_dict_for_model]:
            with pytest.raises(RuntimeError, match="a load of .* failed half-way: load a checkpoint"):
                call()
        with pytest.raises(RuntimeError, match="failed half-way"):
            trainer.save(tmp_path / "checkpoint")
        with pytest.raises(CheckpointError, match="no checkpoint"):
            trainer.load(tmp_path / "nothing")
        with pytest.raises(RuntimeError, match="failed half-way"):
            trainer.step(*batch())
        trainer.load(tmp_path / "checkpoint")
        for name, value in trainer.state_dict_for_model().items():
            assert_equal(value, good[name], name)
        trainer.step(*batch())


def test_a_load_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    with make(model_of(nn.Tanh(), nn.Linear(16, 16))) as other:
        other.step(*batch())
        other.save(tmp_path / "checkpoint")
    with make(model_of()) as trainer:
        trainer.step(*batch())
        with pytest.raises(CheckpointError, match="of another model"):
            trainer.load(tmp_path / "checkpoint")
        trainer.step(*batch())


class FailingFile:
    """A file on a disk that breaks."""

    def __init__(self, file: Any, read: Any) -> None:
        self.name, self.seek = file.name, file.seek
        self.readinto = functools.partial(read, file)


class Expanded(nn.Module):
    """Has a buffer all of whose elements are one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.full((1,), 1.5).expand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def test_an_expanded_buffer_is_loaded_and_carried_over(tmp_path: Path) -> None:
    """save() took it, and every load() failed in the middle, after which nothing could be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Expanded(), nn.Linear(16, 4))
    other = copy.deepcopy(model)
    with trainer_of(model, 2, microbatches=2, lr=1e-2) as trainer:
        trainer.step(*batch())
        trainer.save(tmp_path / "checkpoint")
        trainer.replan()
        expected = float(trainer.step(*batch()).loss)
    with torch.no_grad():
        other[1].gain[:1].fill_(0.5)
    with trainer_of(other, 1, microbatches=2, lr=1e-2) as trainer:
        trainer.prepare(*batch())
        trainer.load(tmp_path / "checkpoint")
        assert float(trainer.step(*batch()).loss) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(other[1].gain, torch.full((16,), 1.5))
