"""Inputs of recomputed layers wait below the device: losses and gradients are those of the run that keeps them."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections import UserList
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_store import FakeStore
from host_side import HostSide
from parking import Fn, assert_parked_equals_kept, decoder, parked, results, token_loss, tokens
from pipelines import WIDTH, batch, model_of, trainer
from torch import nn

import spu
from spu import StageError
from spu.memory.disk_store import DiskStore
from spu.memory.host_store import HostStore
from spu.memory.store import Store

pytestmark = pytest.mark.usefixtures("reference")


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 5])
def test_an_mlp_with_dropout(microbatches: int) -> None:
    x, y = batch(rows=5 if microbatches == 5 else 8)  # 8 rows in 3 or 5 microbatches: the last ones are shorter
    model = model_of(nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
    counts = assert_parked_equals_kept(model, x, y, microbatches=microbatches)
    assert counts.kept == 0
    # two passes, every layer but the first and the last, every row
    assert counts.parked == 2 * 5 * len(x) * WIDTH * 4


@pytest.mark.parametrize(("precision", "virtual"), [("fp32", 5), ("fp16", 3), ("fp16", 5), ("bf16", 5)])
def test_a_decoder(precision: str, virtual: int) -> None:
    x, y = tokens()
    counts = assert_parked_equals_kept(
        decoder(), x, y, precision=precision, virtual=virtual, loss_fn=token_loss, microbatches=3
    )
    assert counts.kept == 0
    if virtual == 5:
        assert counts.parked == 2 * 3 * x.numel() * WIDTH * (4 if precision == "fp32" else 2)


STORES: dict[str, Callable[[Path], Store]] = {
    "host": lambda folder: HostStore(),
    "host, copied beside": lambda folder: HostStore(),
    "disk": DiskStore,
}


@pytest.mark.parametrize(
    ("kind", "codec"), [("host", None), ("host, copied beside", "int8"), ("disk", None), ("disk", "int8")]
)
def test_real_stores(kind: str, codec: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiers that there are, all the same bits; packed ones too, since every store brings back what it was given."""
    x, y = tokens()
    if "beside" in kind:
        monkeypatch.setattr("spu.memory.activations.side_for", HostSide)
    how = {"codec": codec}
    expected, _, plan = results(decoder(), x, y, FakeStore(), how=how, loss_fn=token_loss, microbatches=3)
    store = STORES[kind](tmp_path)
    ours, counts, _ = results(decoder(), x, y, store, how=how, loss_fn=token_loss, microbatches=3, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert counts.kept == 0


@pytest.mark.parametrize(("schedule", "ranks", "virtual"), [("interleaved", 1, 2), ("interleaved", 1, 5)])
def test_any_order_of_actions(schedule: str, ranks: int, virtual: int) -> None:
    """The order of the backward is a guess, which decides what is read ahead, not what is right."""
    x, y = batch()
    model = model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    assert_parked_equals_kept(model, x, y, schedule=schedule, ranks=ranks, virtual=virtual)


LAYERS: dict[str, list[nn.Module]] = {
    "in place": [nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.Hardtanh(inplace=True)],
    "in place of the stage before": [nn.Tanh(), Fn(lambda x: x.mul_(2)), nn.Tanh()],
    "a tuple": [Fn(lambda x: (x * 2, x.sin())), Fn(lambda xs: xs[0] * xs[1])],
    "a dict with text and None": [
        Fn(lambda x: {"a": x * 2, "b": (None, "text"), "c": x.cos()}),
        Fn(lambda d: d["a"] * d["c"]),
    ],
    "one tensor twice": [Fn(lambda x: (y := x * 2, y)), Fn(lambda xs: xs[0] * xs[1])],
    "a tensor and its view": [Fn(lambda x: (y := x * 2, y[:, :3])), Fn(lambda xs: xs[0] + xs[1].sum())],
    "a view first": [Fn(lambda x: ((y := x * 2)[:, 3:7], y)), Fn(lambda xs: xs[1] + xs[0].sum())],
    "transposed": [Fn(lambda x: (x * 2).t().contiguous().t()), nn.Linear(WIDTH, WIDTH), nn.Tanh()],
    "a slice of columns": [Fn(lambda x: torch.cat([x, x.sin()], 1)[:, 4 : 4 + WIDTH]), nn.Linear(WIDTH, WIDTH)],
    "every second column": [Fn(lambda x: torch.cat([x, x.sin()], 1)[:, ::2]), nn.Linear(WIDTH, WIDTH)],
    "expanded": [Fn(lambda x: x.sum(1, keepdim=True).expand(-1, WIDTH)), nn.Linear(WIDTH, WIDTH)],
    "empty": [Fn(lambda x: (x, x[:0] * 2)), Fn(lambda xs: xs[0].tanh() + xs[1].sum())],
    "a scalar": [Fn(lambda x: (x * 2, x.mean())), Fn(lambda xs: xs[0] * xs[1])],
    "integers and masks": [
        Fn(lambda x: (x * 2, torch.arange(WIDTH), x > 0)),
        Fn(lambda xs: (xs[0][:, xs[1]] * xs[2], xs[1], xs[2])),
        Fn(lambda xs: xs[0].where(xs[2], xs[1].float())),
    ],
    "handed on": [
        Fn(lambda x: (x * 2, x.sin())),
        Fn(lambda xs: (xs[0].tanh(), xs[1])),
        Fn(lambda xs: (xs[0] * 3, xs[1])),
        Fn(lambda xs: xs[0] * xs[1]),
    ],
    "identity": [nn.Identity(), nn.Tanh(), nn.Identity()],
    "double precision": [Fn(torch.Tensor.double), Fn(torch.sin), Fn(torch.Tensor.float)],
    "complex": [Fn(lambda x: torch.complex(x, x.sin())), Fn(lambda x: x * x), Fn(lambda x: x.abs())],
    "no gradient between": [Fn(lambda x: x.detach() * 2), nn.Linear(WIDTH, WIDTH)],
    "batch norm": [nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_input(name: str) -> None:
    x, y = batch()
    assert_parked_equals_kept(model_of(*LAYERS[name], nn.Tanh()), x, y, microbatches=3)


@pytest.mark.parametrize(
    "name", ["in place", "in place of the stage before", "a view first", "handed on", "batch norm"]
)
def test_layers_between_which_no_stage_ends(name: str) -> None:
    x, y = batch()
    assert_parked_equals_kept(model_of(*LAYERS[name], nn.Tanh()), x, y, microbatches=3, virtual=3)


def test_skip_connections() -> None:
    class Down(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spu.skips.stash("level", x.sin())
            return x * 2

    class Up(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * spu.skips.pop("level")

    x, y = batch()
    for virtual in (3, 7):
        assert_parked_equals_kept(
            model_of(Down(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), Up(), nn.Tanh()), x, y, virtual=virtual
        )


@pytest.mark.parametrize("stored", [False, True])
def test_an_input_that_is_changed_later_is_refused_as_without_a_store(stored: bool) -> None:
    """Autograd refuses it of a tensor that it has saved; beside a GPU the copy could be under way."""

    class Stash(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spu.skips.stash("x", x)
            return x.sin()

    class Change(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spu.skips.pop("x").mul_(2)
            return x.tanh()

    x, y = batch()
    with pytest.raises(StageError, match=r"changed in place|modified by an inplace"):
        results(model_of(nn.Tanh(), Stash(), Change()), x, y, FakeStore() if stored else None)


def test_what_is_handed_on_is_kept_and_counted() -> None:
    x, y = batch()
    counts = assert_parked_equals_kept(model_of(*LAYERS["handed on"]), x, y, steps=2)
    first, value = len(x) * WIDTH * 4 // 4, len(x) * WIDTH * 4
    # Two layers hand on half of their input. In the first microbatch nobody knows yet that they leave it alone: it is
    # copied, and the copy is parked.
    assert counts.kept == 2 * (2 * value) - 2 * first
    assert counts.parked == 2 * (5 * value) + 2 * first


def test_an_input_with_shared_elements_is_kept_and_counted() -> None:
    x, y = batch()
    counts = assert_parked_equals_kept(model_of(*LAYERS["expanded"]), x, y, steps=1)
    assert counts.kept > 0


def test_a_layer_that_is_not_recomputed_keeps_what_it_saves() -> None:
    x, y = batch()
    counts = assert_parked_equals_kept(model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH)), x, y, recompute=[2], steps=1)
    assert counts.parked == len(x) * WIDTH * 4


def test_no_region_left_or_none_large_enough() -> None:
    x, y = batch()
    model = model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    kept, _, plan = results(model, x, y, None)
    for how in ({"count": 3}, {"size": 0, "count": 3}):
        ours, counts, _ = results(model, x, y, FakeStore(), how=how, plan=plan)
        assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
        assert counts.kept > 0
        assert (counts.parked > 0) == ("size" not in how)


def test_nothing_to_train_before_a_layer() -> None:
    """Inputs without a gradient of a layer that is trained are parked too; layers without a backward park nothing."""
    x, y = batch()
    model = model_of(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    counts = assert_parked_equals_kept(model, x, y, steps=1)
    assert counts.parked == 2 * len(x) * WIDTH * 4


def test_the_users_steps() -> None:
    """Whole steps, evaluation between them, and one shape after another."""
    finals = []
    model = model_of(nn.Tanh(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))
    for store in (None, FakeStore()):
        own = copy.deepcopy(model)
        x, y = batch(rows=12)
        losses = []
        with trainer(own, 1, schedule="layer_outer", virtual=6, recompute=True, microbatches=3, lr=0.1) as t:
            t.prepare(x, y)
            with parked(t, store) if store is not None else contextlib.nullcontext():
                for rows in (12, 7, 12, 2):
                    losses.append(t.step(x[:rows], y[:rows]).loss)
                    losses.append(t.evaluate(x, y))
        finals.append((losses, [p.detach().clone() for p in own.parameters()]))
    assert finals[0][0] == finals[1][0]
    assert all(torch.equal(a, b) for a, b in zip(finals[0][1], finals[1][1], strict=True))


class Watch(nn.Module):
    """Notes how many of the inputs that it has seen are still in memory."""

    def __init__(self, seen: UserList[weakref.ref[Any]]) -> None:
        super().__init__()
        self.seen = seen  # no plain list, of which a recomputation takes out what it has put in
        self.linear = nn.Linear(WIDTH, WIDTH)

    def __deepcopy__(self, memo: Any) -> Watch:
        return Watch(self.seen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(weakref.ref(x.untyped_storage()))
        return self.linear(x)


def test_the_devices_memory_is_freed() -> None:
    """Between forward and backward only the messages of one boundary are in memory, without the collector's help."""
    seen: UserList[weakref.ref[Any]] = UserList()
    alive: list[int] = []

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        return F.cross_entropy(outputs, targets)

    x, y = batch()
    for store, expected in ((None, 12), (FakeStore(), 0)):
        seen.clear()
        alive.clear()
        model = model_of(*(Watch(seen) for _ in range(3)))
        gc.collect()
        gc.disable()
        try:
            with trainer(model, 1, schedule="layer_outer", virtual=5, recompute=True, loss_fn=loss_fn) as t:
                t.prepare(x, y)
                with parked(t, store) if store is not None else contextlib.nullcontext():
                    for _ in range(2):
                        seen.clear()
                        alive.clear()
                        t.forward_backward(x, y)
        finally:
            gc.enable()
        # The first microbatch of a step calls the loss when three layers have run for all four microbatches.
        assert len(seen) == 24
        assert alive[0] == expected, (store, alive)
