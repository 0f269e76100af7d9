"""A pipelined run equals the plain model: losses, gradients and updates, bit for bit on the reference backend.

The plain model runs the same microbatches, one after the other, with the stages' thread count, every layer in the same
random context, and one leaf for each stage that uses a parameter.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from numeric import assert_close_to_truth, assert_equal
from pipelines import devices
from torch import nn

import spu
from spu import LayerRandomness, LossScaler, MainGrads, ModelParallelTrainer
from spu.engine.build import to_precision
from spu.model.layers import DrawKey, Layer, model_layers

pytestmark = pytest.mark.usefixtures("reference")

VOCAB, WIDTH, ROWS, LENGTH = 17, 12, 16, 5


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.silu(self.up(self.norm(x)))))


class Unembed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def make_model(*, tied: bool = False, dropout: float = 0.2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), Block(dropout), Block(0.0), Block(dropout), Unembed())
    if tied:
        model[4].weight = model[0].weight
    return model


def make_batch(seed: int = 1, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    y = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    y[torch.rand(rows, LENGTH, generator=generator) < 0.3] = -100  # uneven counts of masked targets
    return x, y


# (schedule, devices, stages on each), beside gpipe and 1f1b
PIPELINES = [
    ("interleaved", 1, 3),
    ("interleaved", 2, 2),
    ("zb", 1, 1),
    ("zb", 2, 1),
    ("zb", 4, 1),
    ("zbv", 1, 2),
    ("zbv", 2, 2),
    ("layer_outer", 1, 4),
    ("layer_outer", 2, 2),
]


def plain_pass(
    model: nn.Sequential,
    x: torch.Tensor,
    y: torch.Tensor,
    parts: int,
    *,
    step: int = 0,
    scaler: LossScaler | None = None,
    layers: list[Layer] | None = None,
) -> torch.Tensor:
    """Forward and backward of every microbatch in turn; the mean loss of the whole batch.

    ``layers``: the model's in a 16-bit precision, each of which runs its products in it.
    """
    total = (y != -100).sum()
    loss = torch.zeros(())
    for index, (part_x, part_y) in enumerate(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)):
        hidden = part_x
        for layer in layers or ():
            hidden = layer.run(hidden, None, DrawKey(0, step, index))
        for name, module in () if layers else model.named_children():
            with LayerRandomness(0, step, index, name):
                hidden = module(hidden)
        mean = F.cross_entropy(hidden.flatten(0, -2).float(), part_y.flatten())
        share = mean * ((part_y != -100).sum().double() / total).float()
        (share if scaler is None else scaler.scale(share)).backward()
        loss += share.detach()
    return loss


def in_16_bits(model: nn.Sequential, precision: str) -> list[Layer]:
    """A plain model's layers, converted in place as the trainer's are."""
    layers = model_layers(model)
    to_precision(layers, precision, {})
    return layers


def untie(model: nn.Sequential, stages: int, plan: spu.plan.Plan) -> bool:
    """Give the plain model one leaf for each stage that uses the tied weight; whether there are two."""
    first, last = plan.stages[0].layers[1], plan.stages[-1].layers[0]
    if stages == 1 or first > 4 or last == 0:
        return False
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())
    return True


# schedule, devices, stages on each, microbatches, accumulate, tied, recompute: any three of them meet under gpipe and
# 1f1b, any two under the others
SOME = (1, False, False), (2, True, False), (1, True, True)  # accumulate, tied, recompute
CASES = [
    *covering(("gpipe", "1f1b"), (1, 2, 3, 4), (1,), (1, 2, 3, 8), (1, 2), (False, True), (False, True), strength=3),
    *((*pipeline, microbatches, *some) for pipeline, microbatches, some in covering(PIPELINES, (1, 3, 8), SOME)),
]


@pytest.mark.parametrize(("schedule", "ranks", "virtual", "microbatches", "accumulate", "tied", "recompute"), CASES)
def test_every_schedule_equals_the_plain_model(
    schedule: str, ranks: int, virtual: int, microbatches: int, accumulate: int, tied: bool, recompute: bool
) -> None:
    """Bit for bit: W in its own action, and several stages on a device, change no sum's order."""
    model = make_model(tied=tied)
    plain = copy.deepcopy(model)
    x, y = make_batch()
    with ModelParallelTrainer(
        model,
        devices(ranks),
        precision="fp32",
        schedule=schedule,
        virtual=virtual,
        microbatches=microbatches,
        accumulate=accumulate,
        recompute=recompute,
    ) as trainer:
        loss, outputs = trainer.forward_backward(x, y)
        assert (len(trainer.plan.stages), trainer.timeline().rank_count) == (ranks * virtual, ranks)
        assert {span.kind for span in trainer.timeline().spans} == set("FIW" if schedule[:2] == "zb" else "FB")
        split = tied and untie(plain, ranks * virtual, trainer.plan)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        evaluated = trainer.evaluate(x, y)
    assert_equal(loss, plain_pass(plain, x, y, microbatches * accumulate))
    assert outputs.shape == (ROWS, LENGTH, VOCAB)
    if split:
        plain[0].weight.grad += plain[4].weight.grad
    for name, parameter in plain.named_parameters():
        if not (split and name == "4.weight"):
            assert_equal(gradients[name], parameter.grad, name)
    mean = F.cross_entropy(plain.eval()(x).flatten(0, 1), y.flatten()).item()
    assert evaluated == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), PIPELINES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_schedule_equals_the_plain_model_in_16_bits(
    precision: str, schedule: str, ranks: int, virtual: int
) -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    layers = in_16_bits(plain, precision)
    x, y = make_batch()
    with ModelParallelTrainer(
        model, devices(ranks), precision=precision, schedule=schedule, virtual=virtual, microbatches=4
    ) as trainer:
        loss, _ = trainer.forward_backward(x, y)
    scaler = LossScaler(enabled=precision == "fp16")
    with MainGrads(plain.parameters()) as grads:
        scaler.begin_step()
        grads.begin_step()
        assert_equal(loss, plain_pass(plain, x, y, 4, scaler=scaler, layers=layers))
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_equal(ours.grad, theirs.grad, name)


@pytest.mark.parametrize(
    ("precision", "stages", "schedule"), covering(("fp16", "bf16"), (1, 2, 3, 4), ("gpipe", "1f1b"))
)
def test_scaled_16_bit_gradients_equal_the_plain_models(precision: str, stages: int, schedule: str) -> None:
    model = make_model()
    truth = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    layers = in_16_bits(plain, precision)
    x, y = make_batch()
    with ModelParallelTrainer(
        model, devices(stages), precision=precision, schedule=schedule, microbatches=4
    ) as trainer:
        loss, _ = trainer.forward_backward(x, y)
    scaler = LossScaler(enabled=precision == "fp16")
    grads = MainGrads(plain.parameters())
    scaler.begin_step()
    grads.begin_step()
    assert_equal(loss, plain_pass(plain, x, y, 4, scaler=scaler, layers=layers))
    plain_pass(truth, x, y, 4)
    for (name, ours), theirs, true in zip(
        model.named_parameters(), plain.parameters(), truth.parameters(), strict=True
    ):
        assert ours.grad.dtype == torch.float32
        assert_equal(ours.grad, theirs.grad, name)
        relative = (ours.grad - true.grad).norm() / true.grad.norm()
        assert relative < (0.02 if precision == "fp16" else 0.1), f"{name}: {relative}"
    grads.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_updates_equal_the_plain_models_with_torch_adamw(stages: int, tied: bool) -> None:
    """Several steps, fresh dropout in each; with a tie within fp32 rounding: the plain model adds in another order."""
    model = make_model(tied=tied)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, foreach=False)
    with ModelParallelTrainer(model, devices(stages), precision="fp32", microbatches=4, lr=3e-3) as trainer:
        for step in range(4):
            x, y = make_batch(step)
            result = trainer.step(x, y)
            optimizer.zero_grad()
            expected = plain_pass(plain, x, y, 4, step=step)
            optimizer.step()
            assert not result.skipped
            if tied and stages > 1:
                assert result.loss == pytest.approx(expected.item(), rel=1e-5)
            else:
                assert result.loss == expected.item()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if tied and stages > 1:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_equal(ours.detach(), theirs.detach(), name)
    assert not tied or model[0].weight is model[4].weight


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_kernels_stay_within_the_bound(stages: int) -> None:
    """With the automatic backend: twice plain torch's own fp16 error, against fp64."""
    kernels = spu.ops.backends()["cpu"]
    if not kernels.available:
        pytest.skip(f"no C++ backend: {kernels.reason}")
    model = make_model(dropout=0.0)
    truth, plain = copy.deepcopy(model).double(), copy.deepcopy(model).half()
    x, y = make_batch()
    with spu.use_backend("cpu"), ModelParallelTrainer(model, devices(stages), microbatches=4) as trainer:
        _, outputs = trainer.forward_backward(x, y)
    true_outputs, plain_outputs = truth(x), plain(x)
    assert_close_to_truth(outputs, plain_outputs, true_outputs)
    F.cross_entropy(true_outputs.flatten(0, 1), y.flatten()).backward()
    scale = 1024.0
    (F.cross_entropy(plain_outputs.flatten(0, 1).float(), y.flatten()) * scale).backward()
    for ours, theirs, true in zip(model.parameters(), plain.parameters(), truth.parameters(), strict=True):
        assert_close_to_truth(ours.grad, theirs.grad.float() / scale, true.grad)


def test_uneven_batches_and_fully_masked_microbatches() -> None:
    model = make_model(dropout=0.0)
    plain = copy.deepcopy(model)
    x, y = make_batch(rows=7)
    y[:3] = -100
    with ModelParallelTrainer(model, devices(2), precision="fp32", microbatches=3) as trainer:
        loss, _ = trainer.forward_backward(x, y)
    whole = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.isfinite(ours.grad).all(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_packed_transfer_changes_little_and_only_between_stages() -> None:
    x, y = make_batch()
    losses = {}
    for transfer in ("none", "fp16", "int8"):
        model = make_model(dropout=0.0)
        with ModelParallelTrainer(model, devices(2), precision="fp32", microbatches=4, transfer=transfer) as trainer:
            loss, _ = trainer.forward_backward(x, y)
        losses[transfer] = loss.item()
        gradient = model[0].weight.grad
        if transfer == "none":
            exact = gradient
        else:
            relative = ((gradient - exact).norm() / exact.norm()).item()
            assert 0.0 < relative < (1e-3 if transfer == "fp16" else 0.03), f"{transfer}: {relative}"
    assert losses["fp16"] == pytest.approx(losses["none"], rel=1e-3)
    assert losses["int8"] == pytest.approx(losses["none"], rel=1e-2)
    assert losses["int8"] != losses["none"]


class Branches(nn.Module):
    """Hands on a dict with a nested tuple, an integer tensor and a number; has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, tree: dict) -> dict:
        x, (shift, ids) = tree["x"], tree["rest"]
        x = torch.tanh(self.linear(self.norm(x))) + shift
        return {"x": x, "rest": (shift * 0.5, ids + 1), "depth": tree["depth"] + 1}


class Join(nn.Module):
    def forward(self, tree: dict) -> torch.Tensor:
        shift, ids = tree["rest"]
        return tree["x"] * tree["depth"] + shift + ids.unsqueeze(-1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("schedule", "ranks", "virtual"), [("interleaved", 2, 2), ("zb", 3, 1), ("zbv", 2, 2)])
def test_pytrees_and_buffers_under_every_kind_of_schedule(
    schedule: str, ranks: int, virtual: int, recompute: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branches(), Branches(), Branches(), Branches(), Join())
    plain = copy.deepcopy(model)
    rows, parts = 12, 3
    batch = {"x": torch.randn(rows, WIDTH), "rest": (torch.randn(rows, WIDTH), torch.arange(rows)), "depth": 0}
    y = torch.randn(rows, WIDTH)
    with ModelParallelTrainer(
        model, devices(ranks), precision="fp32", schedule=schedule, virtual=virtual, microbatches=parts,
        recompute=recompute, loss_fn=F.mse_loss,
    ) as trainer:  # fmt: skip
        loss, _ = trainer.forward_backward(batch, y)
    expected = torch.zeros(())
    for k in range(parts):
        own = slice(k * rows // parts, (k + 1) * rows // parts)
        x, (shift, ids) = batch["x"], batch["rest"]
        out = plain({"x": x[own], "rest": (shift[own], ids[own]), "depth": 0})
        share = F.mse_loss(out, y[own]) * torch.tensor(1 / parts)
        share.backward()
        expected += share.detach()
    assert_equal(loss, expected)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_equal(ours.grad, theirs.grad, name)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_equal(ours, theirs, name)
