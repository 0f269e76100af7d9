"""When the loss without logits is not for a model or its loss: the plain way is taken, bit for bit.

`WORTH_BYTES` is 0 here; calls of the op are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    LENGTH,
    PARTS,
    VOCAB,
    WIDTH,
    Decoder,
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
from numeric import assert_equal
from pipelines import devices
from torch import Tensor, nn

import spu
from spu.engine import head_loss
from spu.engine.loss import PlainCrossEntropy, cross_entropy, plain_cross_entropy
from spu.engine.stage import Stage
from spu.model.layers import DrawKey, has_order, layers_by_tracing, model_layers
from spu.ops.sink import BackwardScope

__all__ = ["calls"]


def assert_plain(
    model: nn.Module, calls: list[torch.dtype], x: Any = None, y: Any = None, loss_fn: Any = cross_entropy
) -> None:
    """A stage that is asked for no outputs does not call the op: loss and gradients are the plain ones, bit for bit."""
    x, y = batch() if x is None else (x, y)
    layers = model_layers(model) if has_order(model) else layers_by_tracing(model, x)
    stage = Stage(0, layers, devices(1)[0], is_last=True, loss_fn=loss_fn)
    one, key = torch.ones(1), DrawKey(0, 0, 0)
    ways = []
    for whole in (False, True):
        model.zero_grad()
        scope = BackwardScope(one, one, torch.zeros(1), plain=True)
        out = stage.forward(x, x, key, train=True, whole=whole)
        loss = stage.loss(out, y, torch.ones(()), key, scope)
        stage.backward(None, key, scope)
        ways.append({"loss": loss} | {name: p.grad.clone() for name, p in model.named_parameters()})
    assert calls == []
    for name in ways[1]:
        assert_equal(ways[0][name], ways[1][name], name)


def test_the_check_of_the_plain_way_can_fail(calls: list[torch.dtype]) -> None:
    with pytest.raises(AssertionError):
        assert_plain(made(), calls)
    assert calls == [torch.float32]


def test_small_logits(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 8 * LENGTH // PARTS
    monkeypatch.setattr(head_loss, "WORTH_BYTES", 4 * rows * VOCAB + 1)
    x, y = batch(8 // PARTS)
    assert_plain(made(), calls, x, y)
    monkeypatch.setattr(head_loss, "WORTH_BYTES", 4 * rows * VOCAB)
    assert_plain(made(), calls, *batch(6))  # logits of fp32 products must be larger
    both_ways(made(), *batch(), calls, precision="fp16")


@pytest.mark.parametrize(("precision", "endings"), [("fp32", ["tied", "traced"]), ("fp16", ["bare", "sequence"])])
def test_the_reference_backend_is_the_plain_model_bit_for_bit(
    calls: list[torch.dtype], precision: str, endings: list[str]
) -> None:
    x, y = batch()
    for ending in endings:
        model = made(ending)
        with spu.use_backend("reference"), trainer(model, precision=precision) as t:
            ours, plain = (one_pass(t, model, x, y, keep_outputs=keep) for keep in (False, True))
        assert calls == []
        for name in plain:
            assert_equal(ours[name], plain[name], name)


def _hooked(model: nn.Module, register: str) -> nn.Module:
    getattr(model[3], register)(lambda *args: None)
    return model


def _hooked_sequence(model: nn.Module) -> nn.Module:
    model[3].register_forward_hook(lambda *args: None)
    return model


def _parametrized(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model[3])
    return model


def _own_forward(model: nn.Module) -> nn.Module:
    model[3].forward = lambda x: F.linear(x, model[3].weight)
    return model


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


OTHER_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bias": lambda: stack(linear(bias=True)),
    "hook": lambda: _hooked(made(), "register_forward_hook"),
    "pre-hook": lambda: _hooked(made(), "register_forward_pre_hook"),
    "backward hook": lambda: _hooked(made(), "register_full_backward_hook"),
    "hook on the last layer": lambda: _hooked_sequence(made("sequence")),
    "parametrization": lambda: _parametrized(made()),
    "replaced forward": lambda: _own_forward(made()),
    "subclass": lambda: stack(OwnLinear(WIDTH, VOCAB, bias=False)),
    "an activation": lambda: stack(spu.nn.Linear(WIDTH, VOCAB, bias=False, activation="gelu")),
    "something after it": lambda: stack(nn.Sequential(linear(), nn.Tanh())),
    "a layer after it": lambda: stack(linear(), nn.Tanh()),
    "traced, something after it": lambda: Decoder(lambda logits: 2 * logits),
    "traced, two outputs": lambda: Decoder(lambda logits: {"logits": logits}),
    "an empty sequence": lambda: stack(linear(), nn.Sequential()),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_ends_of_a_model(calls: list[torch.dtype], name: str) -> None:
    torch.manual_seed(0)
    if name == "traced, two outputs":
        assert_plain(OTHER_MODELS[name](), calls, loss_fn=lambda out, y: cross_entropy(out["logits"], y))
        assert head_loss.head_of(nn.Sequential()) is None
        return
    assert_plain(OTHER_MODELS[name](), calls)


def test_a_hook_on_all_modules(calls: list[torch.dtype]) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert_plain(made(), calls)
    finally:
        handle.remove()


def test_a_precision_of_the_heads_own(calls: list[torch.dtype]) -> None:
    model = made()
    spu.accelerate(model[3], "bf16")
    assert_plain(model, calls)


class OwnLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2), target.flatten())


def _watched_loss() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda *args: None)
    return loss


LOSSES: dict[str, Any] = {
    "a function": lambda out, y: cross_entropy(out, y),
    "a subclass": OwnLoss(),
    "class weights": nn.CrossEntropyLoss(weight=torch.rand(VOCAB) + 0.5),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "partial with smoothing": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "a hook": _watched_loss(),
    "another loss": nn.MultiMarginLoss(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(calls: list[torch.dtype], name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), linear())
    assert_plain(model, calls, torch.randn(8, 6), torch.randint(VOCAB, (8,)), loss_fn=LOSSES[name])


def test_outputs_that_the_loss_takes_as_they_are(calls: list[torch.dtype]) -> None:
    x, y = batch()
    with trainer(made(), raw_outputs=True, precision="fp16") as t:
        loss, _ = t.forward_backward(x, y, keep_outputs=False)
        assert_equal(loss, t.forward_backward(x, y)[0], "loss")
    assert calls == []


def test_class_probabilities_and_classes_in_the_second_dimension(calls: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), linear())
    x = torch.randn(8, 6)
    assert_plain(model, calls, x, torch.rand(8, VOCAB).softmax(1), loss_fn=F.cross_entropy)
    x = torch.randn(8, 3, 6)  # logits [N, 3 classes, VOCAB]
    assert_plain(model, calls, x, torch.randint(3, (8, VOCAB)), loss_fn=F.cross_entropy)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "range"])
def test_targets_that_do_not_fit_fail_as_on_the_plain_way(calls: list[torch.dtype], wrong: str) -> None:
    x, y = batch()
    wrongly = {"shape": y[:, 1:], "dtype": y.int(), "range": torch.where(y == y.max(), VOCAB, y)}[wrong]
    messages = []
    for keep_outputs in (False, True):
        with trainer(made()) as t, pytest.raises((RuntimeError, ValueError)) as caught:
            t.forward_backward(x, wrongly, keep_outputs=keep_outputs)
        messages.append(str(caught.value))
    if wrong == "range":
        assert f"target {VOCAB} is neither" in messages[0]
        assert f"Target {VOCAB} is out of bounds" in messages[1]
    else:
        assert messages[0] == messages[1]


def test_what_changes_between_steps_counts(calls: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, WIDTH), linear()), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 6), torch.randint(VOCAB, (8,))

    def used() -> bool:
        before = len(calls)
        t.forward_backward(x, y, keep_outputs=False)
        return len(calls) > before

    with trainer(model, loss_fn=loss_fn) as t:
        assert used()
        handle = model[1].register_forward_hook(lambda *args: None)
        assert not used()
        handle.remove()
        loss_fn.label_smoothing = 0.1
        assert not used()
        loss_fn.label_smoothing = 0.0
        with spu.use_backend("reference"):
            assert not used()
        assert used()


def test_what_is_a_plain_cross_entropy() -> None:
    assert plain_cross_entropy(cross_entropy) == PlainCrossEntropy(-100, any_rows=True)
    assert plain_cross_entropy(nn.CrossEntropyLoss(ignore_index=3)) == PlainCrossEntropy(3, any_rows=False)
    assert plain_cross_entropy(nn.CrossEntropyLoss().forward) == PlainCrossEntropy(-100, any_rows=False)
    assert plain_cross_entropy(functools.partial(F.cross_entropy, reduction="sum")) is None
    assert plain_cross_entropy(functools.partial(F.cross_entropy, target=torch.zeros(1))) is None
    assert plain_cross_entropy(functools.partial(cross_entropy, ignore_index=3)) is None
    assert plain_cross_entropy(F.nll_loss) is None
    assert plain_cross_entropy(None) is None


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere"])
def test_a_decoder_that_changes_its_logits(calls: list[torch.dtype], family: str) -> None:
    pytest.importorskip("transformers")
    model = decoder(family)
    ids = torch.randint(64, (8, 6), generator=torch.Generator().manual_seed(0))
    assert_plain(model, calls, ids, ids.roll(-1, 1))


def test_a_decoders_configuration_counts_at_every_step(calls: list[torch.dtype]) -> None:
    pytest.importorskip("transformers")
    model = decoder("Gemma2")
    model.config.final_logit_softcapping = None
    ids = torch.randint(64, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    with trainer(model) as t:
        t.forward_backward(ids, labels, keep_outputs=False)
        assert len(calls) == PARTS
        model.config.final_logit_softcapping = 2.0
        loss, _ = t.forward_backward(ids, labels, keep_outputs=False)
        assert_equal(loss, t.forward_backward(ids, labels)[0], "loss")
        assert len(calls) == PARTS
