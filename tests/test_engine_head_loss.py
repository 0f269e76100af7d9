"""The loss without logits equals the plain one: losses and gradients within the op's bound.

Sizes at which it pays are too large for tests, so that `WORTH_BYTES` is 0 here; calls of the op are counted.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    ENDINGS,
    LENGTH,
    PARTS,
    VOCAB,
    WIDTH,
    batch,
    both_ways,
    calls,
    decoder,
    linear,
    made,
    one_pass,
    stack,
    trainer,
)
from numeric import assert_close_to_truth, assert_equal
from pipelines import SCHEDULES
from torch import Tensor, nn

from spu import LossScaler
from spu.engine import head_loss
from spu.engine.counted import counted_bytes
from spu.engine.loss import cross_entropy, plain_cross_entropy

__all__ = ["calls"]


def assert_within_bound(model: nn.Module, x: Any, y: Tensor, calls: list[torch.dtype], **settings: Any) -> None:
    """Against the whole batch in fp64, from parameters as the precision rounds them."""
    true = copy.deepcopy(model).double()
    ours, plain = both_ways(model, x, y, calls, **settings)
    true.load_state_dict(model.state_dict())
    ignored = plain_cross_entropy(settings.get("loss_fn", cross_entropy)).ignore_index
    out = true(x.double() if x.is_floating_point() else x)
    loss = F.cross_entropy(out.flatten(0, -2), y.flatten(), ignore_index=ignored)
    loss.backward()
    truth = {"loss": loss.detach()} | {name: p.grad for name, p in true.named_parameters()}
    assert ours.keys() == plain.keys() == truth.keys()
    for name, value in ours.items():
        # A sum of some tens of row losses: plain torch's may be exact by luck.
        eps = 4 * torch.finfo(torch.float32).eps * abs(truth["loss"].item()) if name == "loss" else None
        assert_close_to_truth(value, plain[name], truth[name], eps=eps, name=name)


# Equal to the plain way


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_losses_and_gradients_are_within_the_ops_bound(calls: list[torch.dtype], ending: str, precision: str) -> None:
    assert_within_bound(made(ending), *batch(), calls, precision=precision)


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), SCHEDULES)
def test_every_schedule(calls: list[torch.dtype], schedule: str, ranks: int, virtual: int) -> None:
    """A head's weight gradient is made at once, also where a schedule defers the others."""
    settings = {"schedule": schedule, "virtual": virtual, "precision": "fp16", "recompute": virtual == 2}
    assert_within_bound(made("tied"), *batch(), calls, ranks=ranks, **settings)


@pytest.mark.parametrize("ending", ENDINGS)
def test_recompute(calls: list[torch.dtype], ending: str) -> None:
    assert_within_bound(made(ending), *batch(), calls, precision="fp16", recompute=True)


@pytest.mark.parametrize("rows", [3, 7, 10])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ragged_microbatches_one_of_them_all_masked(calls: list[torch.dtype], precision: str, rows: int) -> None:
    x, y = batch(rows)
    y[: rows // 3] = -100
    assert_within_bound(made(), x, y, calls, precision=precision)


@pytest.mark.parametrize(
    "loss_fn",
    [nn.CrossEntropyLoss(ignore_index=7), functools.partial(F.cross_entropy, ignore_index=-1), F.cross_entropy],
)
def test_torchs_losses_with_an_index_of_their_own(calls: list[torch.dtype], loss_fn: Any) -> None:
    """They take logits [N, classes]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), linear())
    x, y = torch.randn(16, 6), torch.randint(VOCAB, (16,))
    y[::5] = plain_cross_entropy(loss_fn).ignore_index
    assert_within_bound(model, x, y, calls, loss_fn=loss_fn)


@pytest.mark.parametrize("loss_weight", ["sum", lambda y: (y >= 0).sum() * 3])
def test_loss_weights(calls: list[torch.dtype], loss_weight: Any) -> None:
    ours, plain = both_ways(made(), *batch(), calls, loss_weight=loss_weight)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["head", "body"])
def test_frozen_parts(calls: list[torch.dtype], part: str) -> None:
    model = made()
    for parameter in (model[3] if part == "head" else model[:3]).parameters():
        parameter.requires_grad_(False)
    ours, plain = both_ways(model, *batch(), calls)
    assert ours.keys() == plain.keys()
    assert ("3.weight" in ours) == (part == "body")
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


def test_steps_and_evaluations(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    model = made()
    results = []
    for worth in (0, 1 << 40):
        monkeypatch.setattr(head_loss, "WORTH_BYTES", worth)
        with trainer(copy.deepcopy(model), precision="fp16", lr=1e-3) as t:
            losses = [t.step(x, y).loss for _ in range(3)]
            results.append([*losses, t.evaluate(x, y)])
        assert len(calls) == 4 * PARTS
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert results[0][0] > results[0][3]


def test_a_gradient_that_overflows_is_found(calls: list[torch.dtype]) -> None:
    x, y = batch()
    with trainer(made(), precision="fp16", scaler=LossScaler(init_scale=2.0**40)) as t:
        assert t.step(x, y).skipped
    assert len(calls) == PARTS


def test_under_the_users_autocast(calls: list[torch.dtype]) -> None:
    x, y = batch()
    model = made()
    with trainer(model) as t:
        exact = one_pass(t, model, x, y, keep_outputs=True)
        with torch.autocast("cpu", torch.bfloat16):
            ours = one_pass(t, model, x, y, keep_outputs=False)
            assert len(calls) == PARTS
            plain = one_pass(t, model, x, y, keep_outputs=True)
    assert len(calls) == PARTS
    for name in plain:
        assert_close_to_truth(ours[name], plain[name], exact[name], name=name)


def test_the_logits_never_exist_whole(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vocab, rows = 2000, 64
    x, y = torch.randint(vocab, (rows, LENGTH)), torch.randint(vocab, (rows, LENGTH))
    peaks = []
    for worth in (0, 1 << 40):
        monkeypatch.setattr(head_loss, "WORTH_BYTES", worth)
        model = nn.Sequential(nn.Embedding(vocab, 8), nn.Linear(8, vocab, bias=False))
        with trainer(model, 1, microbatches=1) as t:
            t.step(x, y)
            with counted_bytes(t._prepared()) as found:
                t.forward_backward(x, y, keep_outputs=False)
        peaks += found.values()
    assert peaks[1] - peaks[0] > 2 * 4 * rows * LENGTH * vocab


def test_weights_are_read_only_while_they_are_there(calls: list[torch.dtype]) -> None:
    from test_memory_residency import Parked

    x, y = batch()
    results = []
    for parked in (False, True):
        model = made("sequence")
        with trainer(model) as t:
            t.prepare(x, y)
            engine = t._prepared().engine
            if parked:
                engine.residencies = [Parked(engine.stages) for _ in engine.residencies]
            results.append(one_pass(t, model, x, y, keep_outputs=False))
    assert len(calls) == 2 * PARTS
    for name in results[0]:
        assert_equal(results[1][name], results[0][name], name)


def test_a_streamed_head(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight, which the embedding uses too, lies in a slot, another one in each visit."""
    from streamed_runs import Lazy, batches, make

    results = []
    for store in (None, Lazy()):
        torch.manual_seed(0)
        model = stack(nn.LayerNorm(WIDTH), nn.Tanh(), linear())
        model[5].weight = model[0].weight
        with make(monkeypatch, model, store, precision="fp16") as t:
            losses = [torch.tensor(t.step(x, y).loss) for x, y in batches(3)]
            results.append([*losses, *t.state_dict_for_model().values()])
    assert len(calls) == 2 * 3 * PARTS
    for streamed, resident in zip(*results, strict=True):
        assert_equal(streamed, resident)


@pytest.mark.parametrize(
    ("family", "precision", "recompute"),
    [("InternLM3", "fp32", True), ("Llama", "fp16", False), ("Gemma", "fp16", True)],
)
def test_a_decoder(calls: list[torch.dtype], family: str, precision: str, recompute: bool) -> None:
    """Its own loss shifts the labels; here the batch has them shifted."""
    pytest.importorskip("transformers")
    model = decoder(family)
    ids = torch.randint(64, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((8, 1), -100)], 1)
    whole = copy.deepcopy(model)
    ours, plain = both_ways(model, ids, labels, calls, precision=precision, recompute=recompute)
    whole.load_state_dict(model.state_dict())
    loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    truth = {"loss": loss.detach()} | {name: p.grad for name, p in whole.named_parameters()}
    assert ours.keys() == plain.keys() == truth.keys()
    for name in truth:
        assert_close_to_truth(ours[name], plain[name], truth[name], name=name, eps=1e-6)
