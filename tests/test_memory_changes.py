"""Weights that are changed where it would be lost: errors that say so, and what is not lost after a flush."""

from __future__ import annotations

import pytest
import torch
from streamed_runs import Lazy, batches, make, model
from torch import nn

from spu.engine.engine import StageError


@pytest.mark.parametrize("how", ["fill_", "another tensor", "another's stand-in"])
def test_a_change_before_flush_is_an_error_once(reference: None, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Between steps ``fill_`` wrote into the stand-in, ``.data =`` replaced it, and both were lost without a word."""
    own = model()
    trainer = make(monkeypatch, own, Lazy(), precision="fp32")
    (x, y), (more, less) = batches(2)
    trainer.step(x, y)
    weight = own.get_parameter("1.0.weight")
    with torch.no_grad():
        if how == "fill_":
            weight.fill_(0.5)
        elif how == "another tensor":
            weight.data = torch.ones_like(weight)
        else:
            own.get_parameter("3.0.weight").data = own.get_parameter("4.weight").data
    name = "3.0.weight" if how == "another's stand-in" else "1.0.weight"
    with pytest.raises(RuntimeError, match=f"'{name}' was changed after a step.*call trainer.flush"):
        trainer.step(more, less)
    assert weight.isnan().all()
    found = [trainer.step(more, less).loss]
    trainer.flush()
    found.append(trainer.evaluate(x, y))
    trainer.close()
    plain = model()
    resident = make(monkeypatch, plain, None, precision="fp32")
    resident.step(x, y)
    assert found == [resident.step(more, less).loss, resident.evaluate(x, y)]
    resident.close()


def test_weights_on_the_device_whose_update_waits_are_not_seen(
    reference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloaded weights showed the values of the step before, and a change of theirs came before the update."""
    results = []
    for store in (None, Lazy()):
        own = model(tied=True)
        trainer = make(monkeypatch, own, store, "offloaded", precision="fp16")
        (x, y), (more, less) = batches(2)
        found = [trainer.step(x, y).loss]
        weight = own.get_parameter("1.0.weight")
        if store is not None:
            assert weight.isnan().all()
            weight.data.zero_()
            with pytest.raises(RuntimeError, match="'1.0.weight' was changed after a step.*call trainer.flush"):
                trainer.step(more, less)
            with pytest.raises(ValueError, match="rows"):
                trainer.step(more, less[:3])
            assert weight.isnan().all()
        found.append(trainer.evaluate(x, y))
        found.append(weight.detach().clone())  # evaluate has run all updates
        found.append(trainer.step(more, less).loss)
        trainer.flush()
        with torch.no_grad():
            weight.mul_(0.5)
        found.append(trainer.step(more, less).loss)
        trainer.close()
        results.append([torch.as_tensor(value) for value in (*found, *own.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_may_be_exchanged_and_transposed_after_flush(reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed view of the weight's own bytes was taken for the weight; of two exchanged ones, one was lost."""
    results = []
    for store in (None, Lazy()):
        own = model()
        trainer = make(monkeypatch, own, store, precision="fp32")
        losses = []
        for x, y in batches(3):
            losses.append(trainer.step(x, y).loss)
            trainer.flush()
            one, two = own.get_parameter("3.0.weight"), own.get_parameter("4.weight")
            one.data, two.data = two.data.t(), one.data
        results.append((losses, [p.detach().clone() for p in own.parameters()]))
        trainer.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("how", ["data.mul_", "data ="])
def test_a_layer_that_changes_its_weight_behind_autograd_is_refused(
    reference: None, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Neither grows the version counter; the change was lost when another stage took the slot."""

    class Shrinks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if how == "data.mul_":
                self.weight.data.mul_(0.5)
            else:
                self.weight.data = self.weight.data * 0.5
            return super().forward(x)

    own = model()
    own[4] = Shrinks(16, 16)
    trainer = make(monkeypatch, own, Lazy(), precision="fp32")
    x, y = batches(1)[0]
    with pytest.raises(StageError, match="changes a weight of its own"):
        trainer.step(x, y)
    trainer.close()


@pytest.mark.parametrize("first", ["step", "evaluate"])
def test_a_change_of_bytes_alone_is_seen_in_training_after_an_evaluation(
    reference: None, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """An evaluation without the change had settled that there was none, and in training it was lost without a word."""
    own = model()
    layer = own[4]

    def forward(x: torch.Tensor) -> torch.Tensor:
        if layer.training:
            layer.weight.data.clamp_(-0.1, 0.1)  # type: ignore[union-attr, operator]
        return nn.functional.linear(x, layer.weight)  # type: ignore[arg-type]

    trainer = make(monkeypatch, own, Lazy(), precision="fp32")
    layer.forward = forward  # type: ignore[method-assign]
    x, y = batches(1)[0]
    if first == "evaluate":
        trainer.evaluate(x, y)
    with pytest.raises(StageError, match="stage 4 changes a weight of its own while it runs"):
        trainer.step(x, y)
    trainer.close()
