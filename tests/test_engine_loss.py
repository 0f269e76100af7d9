"""By how much a microbatch counts: the loss and its gradients are those of the whole batch, in plain torch."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu import ModelParallelTrainer
from spu.engine.engine import StageError
from spu.engine.loss import OnRawOutputs, weighing_of
from spu.engine.loss_check import LossCheck
from spu.ops import linear_cross_entropy

partial = functools.partial
ROWS = 10
_made = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 6, generator=_made)
CLASSES = torch.randint(4, (ROWS,), generator=_made)
MASKED = torch.where(torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 0, 0]).bool(), -100, CLASSES)
RARE = torch.tensor([2, 2, 2, 2, 2, 0, 1, 3, 1, 0])  # class 2 weighs nothing: whole microbatches do
REAL = torch.randn(ROWS, 4, generator=_made)
FLAGS = (REAL > 0).float()
SHARES = REAL.softmax(-1)
LISTS = torch.cat([CLASSES[:, None], torch.full((ROWS, 3), -1)], 1)
WEIGHT = torch.tensor([1.0, 10.0, 0.0, 0.1])
EACH = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Holds(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(**how)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


class Calls(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


class Inherits(nn.CrossEntropyLoss):
    pass


def pixels(outputs: Tensor) -> Tensor:
    """[rows, 4] -> [rows, 2 classes, 2]."""
    return outputs.unflatten(1, (2, 2))


KNOWN: dict[str, tuple[Any, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), MASKED),
    "class weights": (nn.CrossEntropyLoss(WEIGHT), CLASSES),
    "microbatches without weight": (nn.CrossEntropyLoss(WEIGHT), RARE),
    "weights and ignore_index": (nn.CrossEntropyLoss(WEIGHT, ignore_index=1), CLASSES),
    "weights and smoothing": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), MASKED),
    "sum": (nn.CrossEntropyLoss(WEIGHT, reduction="sum"), MASKED),
    "probabilities": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), SHARES),
    "function": (F.cross_entropy, MASKED),
    "partial": (partial(F.cross_entropy, weight=WEIGHT, ignore_index=0), CLASSES),
    "partial of a partial": (partial(partial(F.cross_entropy, weight=EACH), weight=WEIGHT), CLASSES),
    "partial sum": (partial(F.cross_entropy, reduction="sum"), MASKED),
    "partial old sum": (partial(F.cross_entropy, size_average=False), MASKED),
    "method": (nn.CrossEntropyLoss(WEIGHT).forward, CLASSES),
    "inherited": (Inherits(WEIGHT), CLASSES),
    "compiled": (torch.compile(nn.CrossEntropyLoss(WEIGHT), backend="eager"), CLASSES),
    "nll": (nn.NLLLoss(WEIGHT), CLASSES),
    "mse": (nn.MSELoss(), REAL),
    "mse sum": (nn.MSELoss(reduction="sum"), REAL),
    "l1": (nn.L1Loss(), REAL),
    "smooth l1": (nn.SmoothL1Loss(), REAL),
    "huber": (nn.HuberLoss(), REAL),
    "bce with logits": (nn.BCEWithLogitsLoss(pos_weight=EACH), FLAGS),
    "weighted bce with logits": (nn.BCEWithLogitsLoss(weight=EACH), FLAGS),
    "kl mean": (nn.KLDivLoss(), SHARES),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), SHARES),
    "partial kl": (partial(F.kl_div, reduction="batchmean"), SHARES),
    "poisson": (nn.PoissonNLLLoss(), FLAGS),
    "soft margin": (nn.SoftMarginLoss(), 2 * FLAGS - 1),
    "hinge": (nn.HingeEmbeddingLoss(), 2 * FLAGS - 1),
    "multi margin": (nn.MultiMarginLoss(weight=WEIGHT), CLASSES),
    "multilabel margin": (nn.MultiLabelMarginLoss(), LISTS),
    "multilabel soft margin": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), FLAGS),
}
OWN: dict[str, tuple[Any, Tensor]] = {  # what they divide by is the number of their targets, as is taken for true
    "lambda": (lambda o, t: F.cross_entropy(o, t), MASKED),
    "pixels": (lambda o, t: F.cross_entropy(pixels(o), t % 2), LISTS.abs()[:, :2]),
    "module": (Holds(), MASKED),
    "overridden": (Calls(), MASKED),
    "bce": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), FLAGS),
    "square": (lambda o, t: (o - t).square().mean(), REAL),
    "cosine": (lambda o, t: F.cosine_embedding_loss(o, t, torch.ones(len(o))), REAL),
    "triplet": (lambda o, t: F.triplet_margin_loss(o, t, t.flip(1)), REAL),
    "margin": (lambda o, t: F.margin_ranking_loss(o[:, 0], t[:, 0], torch.ones(len(o))), REAL),
}


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    kept = (targets != 2).float()
    return (F.cross_entropy(outputs, targets, reduction="none") * kept).sum() / kept.sum()


OTHER: dict[str, tuple[Any, Tensor]] = {  # it is not
    "hidden weights": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHT), CLASSES),
    "hidden sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), CLASSES),
    "weights of a held loss": (Holds(weight=WEIGHT), CLASSES),
    "weights of an overridden one": (Calls(WEIGHT), CLASSES),
    "a mask of its own": (masked, CLASSES),
    "no mean in a microbatch": (masked, RARE),
    "rows among each other": (lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o))), CLASSES),
    "spread of the batch": (lambda o, t: F.mse_loss(o, t) + o.std(), REAL),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def trainer_of(ours: nn.Module, loss: Any, parts: int = 4, accumulate: int = 1, **how: Any) -> ModelParallelTrainer:
    return ModelParallelTrainer(
        ours, ["cpu:0", "cpu:1"], loss_fn=loss, precision="fp32", microbatches=parts, accumulate=accumulate, **how
    )


def check_whole(loss: Any, targets: Tensor, trainer: ModelParallelTrainer, ours: nn.Module) -> None:
    plain = copy.deepcopy(ours)
    whole = loss(plain(X), targets)
    whole.backward()
    with trainer:
        assert trainer.evaluate(X, targets) == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
        value, _ = trainer.forward_backward(X, targets)
        assert value.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [*KNOWN, *OWN])
def test_microbatches_make_the_whole_batchs_loss(name: str) -> None:
    loss, targets = (KNOWN | OWN)[name]
    assert weighing_of(loss).known == (name in KNOWN)
    ours = model()
    check_whole(loss, targets, trainer_of(ours, loss), ours)


@pytest.mark.parametrize("name", ["class weights", "microbatches without weight", "sum", "kl batchmean", "lambda"])
def test_and_so_do_rounds_of_accumulation(name: str) -> None:
    loss, targets = (KNOWN | OWN)[name]
    ours = model()
    check_whole(loss, targets, trainer_of(ours, loss, parts=2, accumulate=2), ours)


@pytest.mark.parametrize("name", OTHER)
def test_a_loss_that_divides_by_something_else_is_refused(name: str) -> None:
    loss, targets = OTHER[name]
    ours = model()
    with trainer_of(ours, loss) as trainer:
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match="loss_fn cannot be computed by microbatches.*loss_weight="):
            trainer.step(X, targets)
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        assert trainer.steps_done == 0
        assert all(p.grad is None for p in ours.parameters())
    with (
        trainer_of(model(), loss) as trainer,
        pytest.raises(ValueError, match="loss_fn cannot be computed by microbatches"),
    ):
        trainer.evaluate(X, targets)
    ours = model()
    check_whole(loss, targets, trainer_of(ours, loss, parts=1), ours)


@pytest.mark.parametrize(
    ("name", "loss_weight"),
    [
        ("hidden weights", lambda y: WEIGHT[y].sum()),
        ("hidden sum", "sum"),
        ("a mask of its own", lambda y: (y != 2).sum()),
        ("no mean in a microbatch", lambda y: (y != 2).sum()),
    ],
)
def test_loss_weight_says_what_a_loss_divides_by(name: str, loss_weight: Any) -> None:
    loss, targets = OTHER[name]
    ours = model()
    check_whole(loss, targets, trainer_of(ours, loss, loss_weight=loss_weight), ours)


BROADCAST: dict[str, Any] = {  # every output would meet every target of its microbatch, and not of the batch
    "mse": nn.MSELoss(),
    "mse sum": nn.MSELoss(reduction="sum"),
    "l1": F.l1_loss,
    "smooth l1": nn.SmoothL1Loss(),
    "huber": partial(F.huber_loss, delta=0.5),
    "kl batchmean": nn.KLDivLoss(reduction="batchmean"),
    "poisson": nn.PoissonNLLLoss(),
    "hinge": nn.HingeEmbeddingLoss(),
    "multilabel soft margin": nn.MultiLabelSoftMarginLoss(),
    "own": lambda o, t: (o - t).square().mean(),
}


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("kind", ["targets without the last dimension", "outputs without it"])
def test_a_loss_that_broadcasts_rows_is_refused(name: str, kind: str) -> None:
    """Plain torch warns of most of these, and has the mean over [rows, rows]; over microbatches it would be another."""
    loss, alone = BROADCAST[name], kind.startswith("targets")

    def ours() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Identity() if alone else nn.Flatten(0))

    targets = FLAGS[:, 0] if alone else FLAGS[:, :1]
    with trainer_of(ours(), loss) as trainer, pytest.raises((StageError, ValueError), match="by microbatches"):
        trainer.step(X, targets)
    with trainer_of(ours(), loss) as trainer, pytest.raises((StageError, ValueError), match="by microbatches"):
        trainer.evaluate(X, targets)
    with trainer_of(ours(), loss, loss_weight=len) as trainer:
        if name == "own":
            return  # the user's word is taken
        with pytest.raises(StageError, match="by microbatches"):
            trainer.step(X, targets)
    whole = ours()
    check_whole(loss, targets, trainer_of(whole, loss, parts=1), whole)


def test_targets_that_are_broadcast_within_their_rows_are_trained() -> None:
    ours = model()
    check_whole(nn.MSELoss(), REAL[:, :1], trainer_of(ours, nn.MSELoss()), ours)


def test_a_check_looks_at_later_batches_too() -> None:
    """The first batch may have none of the targets that a loss of one's own leaves out."""
    targets = torch.where(CLASSES == 2, 0, CLASSES)
    with trainer_of(model(), masked) as trainer:
        trainer.step(X, targets)
        with pytest.raises(ValueError, match="loss_fn cannot be computed by microbatches"):
            for _ in range(2):
                trainer.step(X, RARE)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda o, t: F.cross_entropy(F.dropout(o, 0.5), t), "it draws random numbers"),
        (lambda o, t: F.cross_entropy(o[: 12 - 9 * (len(o) > 6)], t), "raised ValueError"),
    ],
    ids=["draws", "bound to a size"],
)
def test_a_loss_that_cannot_be_checked_is_trained_with_a_warning(loss: Any, why: str) -> None:
    with trainer_of(model(), loss) as trainer:
        with pytest.warns(UserWarning, match=f"could not be checked.*{why}"):
            assert trainer.step(X, CLASSES).loss > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step(X, CLASSES)  # said once


def test_equal_losses_of_all_microbatches_do_not_hide_wrong_weights() -> None:
    """At the start of training they are all alike, whatever counts; the gradients are not."""
    check = LossCheck(lambda o, t: F.cross_entropy(o, t, weight=EACH), weighing_of(lambda o, t: None))
    assert check.begin(2)
    for targets in (torch.zeros(3).long(), torch.full((3,), 3)):
        check.add(torch.zeros(3, 4), targets)
    with pytest.raises(ValueError, match=r"microbatch 0 has 0\.5 of the batch's targets, but counts 0\.2"):
        check.end()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("margin", [0.0, 8.0, 11.0, 12.0, 14.0])
def test_gradients_that_fp16_can_hardly_hold_are_no_evidence(margin: float, raw: bool) -> None:
    """A model that has learnt its data: the whole batch's gradients are rounded where a microbatch's are not yet."""
    targets = torch.arange(64) % 4
    logits = (margin * F.one_hot(targets) + 0.5 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))).half()

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.float(), t)

    check = LossCheck(OnRawOutputs(loss) if raw else loss, weighing_of(loss))
    assert check.begin(8)
    for outputs, labels in zip(logits.split(8), targets.split(8), strict=True):
        check.add(outputs, labels)
    check.end()


def test_what_is_looked_at_is_bounded() -> None:
    """Of outputs as large as a vocabulary's logits only some rows are kept."""
    check = LossCheck(lambda o, t: F.mse_loss(o, t), weighing_of(lambda o, t: None))
    check.begin(8)
    for _ in range(8):
        check.add(torch.zeros(1, 1).expand(64, 1 << 17), torch.zeros(64, 1))
    assert sum(outputs.numel() for outputs, _ in check._seen) * 4 < 1 << 26
    check.end()
    assert not [check.begin(8) for _ in range(9)][1]


@pytest.mark.parametrize("unlike", [lambda o: (o, o.mean()), lambda o: (o, None)])
def test_other_outputs_beside_rows(unlike: Callable[[Tensor], Any]) -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return unlike(super().forward(x))

    ours = nn.Sequential(nn.Linear(6, 8), Two(8, 4))
    with trainer_of(ours, lambda o, t: F.cross_entropy(o[0], t)) as trainer:
        assert trainer.step(X, CLASSES).loss > 0


class Head(nn.Linear):
    """Hands its weight on, with as many rows as a microbatch has."""

    def forward(self, x: Tensor) -> Any:
        return x, self.weight


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_fused_loss_of_this_library(precision: str, raw: bool) -> None:
    ours = nn.Sequential(nn.Linear(6, 8), Head(8, 5, bias=False))
    plain = copy.deepcopy(ours)
    with ModelParallelTrainer(
        ours, ["cpu:0", "cpu:1"], loss_fn=lambda o, t: linear_cross_entropy(*o, t), precision=precision, microbatches=2,
        raw_outputs=raw,
    ) as trainer:  # fmt: skip
        value, _ = trainer.forward_backward(X, MASKED)
    whole = F.cross_entropy(F.linear(*plain(X)), MASKED)
    whole.backward()
    assert value.item() == pytest.approx(whole.item(), rel=1e-2)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.02 * b.grad.norm()


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), partial(F.mse_loss, reduction="none")])
def test_a_loss_without_a_reduction_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="reduction='none', but a step needs one number"):
        trainer_of(model(), loss)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_no_mean_has_are_refused(bad: float) -> None:
    """A negative weight counted nothing, but stayed in the total."""
    with pytest.raises(ValueError, match="weight must be 0 or more, and finite"):
        trainer_of(model(), nn.CrossEntropyLoss(torch.tensor([1.0, bad, 1.0, 1.0])))
    given = iter([1.0, bad, 2.0, 1.0])
    with (
        trainer_of(model(), None, loss_weight=lambda y: next(given)) as trainer,
        pytest.raises(ValueError, match="must count 0 or more"),
    ):
        trainer.step(X, CLASSES)
    with pytest.raises(ValueError, match="unknown loss_weight 'mean'"):
        trainer_of(model(), None, loss_weight="mean")


def test_weights_are_read_when_they_are_used() -> None:
    loss = nn.CrossEntropyLoss(torch.ones(4))
    weighing = weighing_of(loss)
    loss.weight.copy_(EACH)
    shares = weighing.shares([torch.tensor([0]), torch.tensor([3])])
    assert [share.item() for share in shares] == pytest.approx([0.2, 0.8])
