"""Models that are no list of layers: traced, cut, and trained as the plain model is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from numeric import assert_equal
from pipelines import SCHEDULES, SOME_SCHEDULES, batch, trainer
from torch import nn

from spu.engine.microbatch import as_dicts
from spu.model.traced import arguments


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Residual(nn.Module):
    """A classifier of images, with a parameter of its own and a list of blocks that a child runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.blocks = nn.Sequential(*(Block(4) for _ in range(3)))
        self.gain = nn.Parameter(torch.full((4, 1, 1), 1.5))
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.norm(self.stem(x)))
        x = self.blocks(first) * self.gain + first
        return self.head(x.mean((2, 3)) * self.gain.view(-1))


class Dense(nn.Module):
    """Every block sees the outputs of all blocks before it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 3, padding=1) for k in range(4))
        self.head = nn.Linear(11, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for block in self.blocks:
            features.append(torch.relu(block(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1).flatten(2).mean(2))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 6)))
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((12, 4), (8, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for conv in self.down:
            x = F.relu(conv(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for conv in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:])
            x = F.relu(conv(torch.cat([x, skip], 1)))
        return x.mean((2, 3))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).train()


def images(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.randint(4, (rows,), generator=generator)


def texts(rows: int = 8) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 6, dtype=torch.int64)
    mask[1::2, 4:] = 0
    ids = torch.randint(30, (rows, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(4, (rows,), generator=generator)


def made(kind: Any) -> tuple[nn.Module, Any, torch.Tensor, Any]:
    """Return a model, a batch, and the loss."""
    torch.manual_seed(0)
    model = kind()
    if kind is bert:
        return model, *texts(), lambda outputs, targets: F.cross_entropy(outputs.logits, targets)
    return model, *images(), F.cross_entropy


def plain_pass(model: nn.Module, x: Any, y: torch.Tensor, parts: int, loss_fn: Any) -> torch.Tensor:
    total = torch.zeros(())
    for index in range(parts):
        rows = torch.arange(len(y)).tensor_split(parts)[index]
        part = {k: v[rows] for k, v in x.items()} if isinstance(x, dict) else x[rows]
        args, kwargs = arguments(model, as_dicts(part))
        share = loss_fn(model(*args, **kwargs), y[rows]) * torch.tensor(len(rows) / len(y))
        share.backward()
        total += share.detach()
    return total


def assert_equals_plain(model: nn.Module, x: Any, y: torch.Tensor, loss_fn: Any, ranks: int, **settings: Any) -> None:
    plain = copy.deepcopy(model)
    same_order = settings.pop("same_order", True)
    with trainer(model, ranks, loss_fn=loss_fn, **settings) as t:
        for _ in range(2):
            loss, _ = t.forward_backward(x, y)
            plain.zero_grad()
            assert_equal(loss, plain_pass(plain, x, y, 4, loss_fn), "loss")
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert theirs.grad is not None
                if same_order:
                    assert_equal(ours.grad, theirs.grad, name)
                else:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
            for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
                assert_equal(ours, theirs, name)
        assert t.state_dict_for_model().keys() == model.state_dict().keys()


# All schedules with the model whose tensors skip most stages; each model with few and many stages, kept and recomputed.
WAYS = [(UNet, schedule, False) for schedule in SCHEDULES]
WAYS += [(kind, schedule, False) for kind in (Residual, Dense) for schedule in SOME_SCHEDULES]
WAYS += covering((Residual, Dense, UNet), SOME_SCHEDULES, (True,))


@pytest.mark.parametrize(("kind", "schedule", "recompute"), WAYS)
@pytest.mark.usefixtures("reference")
def test_losses_and_gradients_are_the_plain_models(kind: Any, schedule: tuple[str, int, int], recompute: bool) -> None:
    model, x, y, loss_fn = made(kind)
    name, ranks, virtual = schedule
    assert_equals_plain(model, x, y, loss_fn, ranks, schedule=name, virtual=virtual, recompute=recompute)


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.usefixtures("reference")
def test_an_encoder_classifier_of_transformers(schedule: str) -> None:
    model, x, y, loss_fn = made(bert)
    assert_equals_plain(model, x, y, loss_fn, 2, schedule=schedule)


class Cell(nn.Module):
    """Uses one layer three times, one with batch norm, and dropout that is a module."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.again = nn.Linear(8, 8)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.first(x))
        for _ in range(3):
            x = self.drop(torch.tanh(self.again(x)))
        if scale is not None:
            x = x * scale
        return self.head(x) + F.linear(x, self.head.weight)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.usefixtures("reference")
def test_a_module_that_is_called_often_and_batch_norm(ranks: int) -> None:
    torch.manual_seed(0)
    assert_equals_plain(Cell(), *batch(), F.cross_entropy, ranks, same_order=False)


@pytest.mark.usefixtures("reference")
def test_optional_inputs_by_name_and_by_place() -> None:
    x, y = batch()
    for inputs in ((x, torch.full((8, 1), 0.5)), {"x": x, "scale": torch.full((8, 1), 0.5)}, {"x": x, "scale": None}):
        torch.manual_seed(0)
        model = Cell()
        plain = copy.deepcopy(model).eval()
        args, kwargs = arguments(plain, inputs)
        with trainer(model) as t:
            assert t.evaluate(inputs, y) == pytest.approx(F.cross_entropy(plain(*args, **kwargs), y).item(), abs=1e-6)
            with pytest.raises(Exception, match="arranged otherwise"):
                t.step(x, y)


@pytest.mark.usefixtures("reference")
def test_dropout_is_off_in_evaluation_and_the_same_for_every_number_of_stages() -> None:
    losses = []
    for ranks in (1, 2, 3):
        torch.manual_seed(0)
        with trainer(Cell(0.5), ranks) as t:
            losses.append([t.step(*batch()).loss for _ in range(3)] + [t.evaluate(*batch())])
    assert losses[0] == losses[1] == losses[2]
    torch.manual_seed(0)
    with trainer(Cell(), 1) as t:
        assert t.step(*batch()).loss != losses[0][0]


def test_a_checkpoint_goes_to_another_number_of_stages_and_the_names_are_the_models(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Residual()
    with trainer(model, 2, precision="bf16") as t:
        t.step(*images())
        t.save(tmp_path / "saved")
        assert sorted(t.state_dict_for_model()) == sorted(model.state_dict())
        expected = [t.step(*images()).loss for _ in range(2)]
        state = t.state_dict_for_model()
    other = Residual()
    with trainer(other, 3, precision="bf16") as t:
        t.prepare(*images())
        t.load(tmp_path / "saved")
        assert [t.step(*images()).loss for _ in range(2)] == pytest.approx(expected, abs=1e-2)
        for name, value in t.state_dict_for_model().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=1e-3)
    Residual().load_state_dict(state)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_with_fused_layers(precision: str) -> None:
    torch.manual_seed(0)
    model = UNet()
    with trainer(model, 3, precision=precision, lr=1e-2) as t:
        losses = [t.step(*images()).loss for _ in range(20)]
        assert t.plan is not None
        assert sum(len(range(*stage.layers)) for stage in t.plan.stages) == 5
    assert losses[-1] < losses[0]


def test_two_trainers_of_one_model_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = Residual()
    first = trainer(model, 2, precision="bf16")
    first.step(*images())
    with trainer(model, 3, precision="bf16") as second:
        second.step(*images())
    first.close()
    assert type(model.stem) is nn.Conv2d
    assert type(model.head) is nn.Linear


@pytest.mark.usefixtures("reference")
def test_a_checkpoint_of_a_module_in_several_stages(tmp_path: Any) -> None:
    torch.manual_seed(0)
    with trainer(Cell(), 3) as t:
        t.step(*batch())
        t.save(tmp_path / "saved")
        expected = [t.step(*batch()).loss for _ in range(2)]
    for ranks in (1, 3):
        with trainer(Cell(), ranks) as t:
            t.prepare(*batch())
            t.load(tmp_path / "saved")
            assert [t.step(*batch()).loss for _ in range(2)] == pytest.approx(expected, rel=1e-6)


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Skipping(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self[0](x)
        for layer in self[1:]:
            x = layer(x)
        return x + first.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [Doubled, Skipping, nn.Sequential])
def test_a_sequence_with_a_forward_of_its_own(reference: None, kind: type[nn.Sequential]) -> None:
    """A pipeline of its layers would not call it: a class's was refused, an instance's left out without a word."""
    torch.manual_seed(0)
    model = kind(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    if kind is nn.Sequential:
        model.forward = lambda x: model[4](model[0](x)) - 1  # type: ignore[method-assign]
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with trainer(model, 2, microbatches=1) as t:
        found, _ = t.forward_backward(x, y)
        assert len(t.plan.stages) == 2
    assert_equal(found, loss.detach(), "loss")
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            assert_equal(parameter.grad, gradient, name)


class Wrapper(nn.Module):
    """As scripts wrap a network that somebody else has written."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * 2


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.usefixtures("reference")
def test_a_wrapper_around_a_small_network_is_cut(depth: int) -> None:
    """It counted as one layer: "2 devices for 1 layers"."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    for _ in range(depth):
        net = Wrapper(net)
    assert_equals_plain(net, torch.randn(8, 6), torch.randint(4, (8,)), F.cross_entropy, 2)


def test_where_there_are_too_few_layers_the_error_says_what_was_not_looked_into() -> None:
    class Decides(Wrapper):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if x.sum() > 0 else x @ self.net[0].weight.T

    blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    with (
        trainer(Wrapper(Decides(blocks)), 2, microbatches=2) as t,
        pytest.raises(ValueError, match=r"2 devices for 1 layer: .*at most 1 device \(module 'net' .*control flow"),
    ):
        t.prepare(torch.randn(8, 6), torch.randint(4, (8,)))
