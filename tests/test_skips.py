"""Skip connections over stages: the same losses and gradients as the plain model, and errors that name the skip."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import devices
from torch import nn

from spu import ModelParallelTrainer, StageError, skips, use_backend

WIDTH, ROWS, PARTS = 6, 8, 4


class Stash(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        skips.stash(self.name, x)
        return x * 0.5


class Pop(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x) * skips.pop(self.name))


def make_model() -> nn.Sequential:
    """Nested, like a U-Net, with a third skip inside, and plain layers under them."""
    torch.manual_seed(0)
    return nn.Sequential(
        Stash("a"), Stash("b"), Stash("c"), Pop("c"), nn.Linear(WIDTH, WIDTH), Pop("b"), Pop("a"), nn.Linear(WIDTH, 3)
    )


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randint(3, (ROWS,), generator=generator)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("schedule", "ranks", "virtual"),
    [("1f1b", 1, 1), ("1f1b", 3, 1), ("gpipe", 8, 1), ("interleaved", 2, 4), ("zb", 4, 1), ("zbv", 2, 2)],
)
def test_a_pipeline_with_skips_equals_the_plain_model(schedule: str, ranks: int, virtual: int, recompute: bool) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    x, y = make_batch()
    torch.set_num_threads(1)
    with (
        use_backend("reference"),
        ModelParallelTrainer(
            model, devices(ranks), precision="fp32", microbatches=PARTS, schedule=schedule, virtual=virtual,
            recompute=recompute,
        ) as trainer,
    ):  # fmt: skip
        loss, _ = trainer.forward_backward(x, y)
        evaluated = trainer.evaluate(x, y)
    expected = torch.zeros(())
    for part_x, part_y in zip(x.tensor_split(PARTS), y.tensor_split(PARTS), strict=True):
        share = F.cross_entropy(plain(part_x), part_y) * (1 / PARTS)
        share.backward()
        expected += share.detach()
    assert_equal(loss, expected)
    assert evaluated == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad, name)


def test_integers_cross_without_a_gradient() -> None:
    class StashIds(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            skips.stash("ids", ids)
            return F.one_hot(ids, WIDTH).float()

    class PopIds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + skips.pop("ids").unsqueeze(-1)

    layers = [StashIds(), nn.Linear(WIDTH, WIDTH), PopIds()]
    x = torch.randint(WIDTH, (4,))
    with ModelParallelTrainer(layers, devices(3), precision="fp32", microbatches=2) as trainer:
        _, outputs = trainer.forward_backward(x, x)
    torch.testing.assert_close(outputs, layers[1](F.one_hot(x, WIDTH).float()) + x.unsqueeze(-1))


def test_what_is_missing_or_left_over_is_named() -> None:
    x, y = torch.randn(4, WIDTH), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="no layer before this one has stashed 'never'"):
        skips.pop("never")
    with pytest.raises(TypeError, match="stash takes a tensor, got int for 'n'"):
        skips.stash("n", 3)
    with (
        ModelParallelTrainer([Stash("left"), nn.Linear(WIDTH, 3)], devices(2), precision="fp32", microbatches=2) as t,
        pytest.raises(ValueError, match="'left' was stashed, but no later layer has popped it"),
    ):
        t.step(x, y)
    with (
        ModelParallelTrainer([Stash("a"), Stash("a"), Pop("a")], devices(3), precision="fp32", microbatches=2) as t,
        pytest.raises(StageError, match="stage 1 .* ValueError: 'a' is stashed already"),
    ):
        t.step(x, y)


def test_threads_do_not_see_each_others_skips() -> None:
    skips.stash("mine", torch.ones(1))
    failures: list[str] = []

    def other() -> None:
        try:
            skips.pop("mine")
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(failures) == 1
    assert skips.pop("mine").item() == 1.0


def run_by_hand(detach: bool) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    model = make_model()
    plain, (x, y) = copy.deepcopy(model), make_batch()
    trainer = ModelParallelTrainer(devices=devices(2))
    for part in (model[:4], model[4:]):
        trainer.add_module(part)
    out = x
    for module in trainer.modules():
        out = module(out.detach().requires_grad_(True) if detach else out)
    F.cross_entropy(out, y).backward()
    F.cross_entropy(plain(x), y).backward()
    return [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]


def test_a_hand_run_loop_takes_skips_along_its_graph() -> None:
    for ours, theirs in zip(*run_by_hand(detach=False), strict=True):
        assert_equal(ours, theirs)


def test_a_hand_run_loop_that_detaches_says_how_to_hand_a_skip_on() -> None:
    with pytest.raises(ValueError, match=r"'b' was stashed in part 0 and popped in part 1.*Hand it on as an output"):
        run_by_hand(detach=True)
