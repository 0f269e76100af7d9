"""Planning runs a user's layers and losses, and nothing of it is left: not in them, nor in what they reach."""

from __future__ import annotations

import collections
import functools
import queue
import random
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from object_graph import difference, fakes, snapshot
from pipelines import batch as seeded_batch
from torch import nn

from spu import ModelParallelTrainer

SEEN: list = []
CACHE: dict = {}
batch = functools.partial(seeded_batch, seed=1)
LAST = None


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return self.function(h) * self.scale


class Keeps(nn.Module):
    """Counts, keeps and caches in every way that a module has."""

    shared: dict = {}  # noqa: RUF012
    calls = 0

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.own, self.table, self.count, self.nested = [], {}, 0, {"deep": [collections.deque(maxlen=9)]}
        self.total, self.steps = torch.zeros(16), torch.zeros((), dtype=torch.int64)
        self.helper = functools.partial(self.lin.forward)
        self.again = lambda x: self.lin(x)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, h):
        self.own.append(h)
        self.table.setdefault(len(h), torch.arange(16.0))
        self.shared["h"] = h
        type(self).calls += 1
        self.count += 1
        self.nested["deep"][0].append(h)
        self.total += h.detach().mean(0)
        self.total += 1
        self.steps += 1
        self.mean.lerp_(h.detach().mean(0), 0.5)
        self.late = h
        return self.lin(h) + self.again(h) + self.table[len(h)]


@functools.lru_cache
def positions(length, width):
    return torch.linspace(0, 1, length * width).view(length, width)


def remembers(h):
    global LAST
    LAST = h
    SEEN.append(h)
    if len(h) not in CACHE:
        CACHE[len(h)] = torch.arange(float(h.shape[1]))
    remembers.calls = getattr(remembers, "calls", 0) + 1
    return h + CACHE[len(h)] + positions(*h.shape)


class Meter:
    def __init__(self):
        self.values, self.best = [], None

    def loss(self, outputs, targets):
        value = F.cross_entropy(outputs, targets)
        self.values.append(value)
        self.best = value if self.best is None else torch.minimum(self.best, value)
        return value


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.t, self.seen = nn.Parameter(torch.ones(4)), []
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, targets):
        value = F.cross_entropy(outputs * self.t, targets)
        self.seen.append(value)
        self.mean.add_(value.detach())
        return value


def seeded(make):
    torch.manual_seed(0)
    return model(make())


def model(*middle):
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Linear(16, 4))


def closure_layer():
    weight, seen, totals = nn.Parameter(torch.ones(16)), [], torch.zeros(16)
    weight.register_hook(lambda g: seen.append(g))

    def run(h):
        seen.append(h)
        totals.add_(h.detach().sum(0))
        totals.add_(1).sub_(2)
        return h * weight

    return Calls(run)


class ModulesInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [nn.Linear(16, 16), nn.BatchNorm1d(16)]

    def forward(self, h):
        for part in self.parts:
            h = part(h)
        return h


def hooked():
    layer, seen = nn.Linear(16, 16), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    layer.register_forward_hook(lambda module, args, out: seen.append(out.sum().item()))
    layer.register_full_backward_hook(lambda module, gi, go: seen.append(go))
    layer.weight.register_hook(lambda g: seen.append(g))
    layer.seen = seen
    return layer


class NoCopies(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("not to be copied")


LAYERS = {
    "keeps": Keeps,
    "closure": closure_layer,
    "globals": lambda: Calls(remembers),
    "modules in a list": ModulesInAList,
    "hooks": hooked,
    "old weight_norm": lambda: torch.nn.utils.weight_norm(nn.Linear(16, 16)),
    "parametrized": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    "no copies": lambda: NoCopies(16, 16),
    "dropout": lambda: nn.Dropout(0.5),
    "reads a value": lambda: Calls(lambda h: h * 2 if h.sum().item() > 0 else h * 3),
    "random numbers": lambda: Calls(lambda h: h * random.random() if h.sum().item() else h),
}
LOSSES = {
    "module": Learned,
    "method": lambda: Meter().loss,
    "closure": lambda: (lambda seen: lambda o, t: seen.append(o) or F.cross_entropy(o, t))([]),
    "partial": lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
}


def reset():
    global LAST
    LAST = None
    SEEN.clear()
    CACHE.clear()
    positions.cache_clear()
    remembers.__dict__.clear()
    Keeps.shared.clear()
    Keeps.calls = 0


def check_untouched(net, loss, **settings):
    inputs, targets = batch()
    random.seed(3)
    states, others = (torch.get_rng_state(), random.getstate()), fakes()  # torch.compile keeps its own
    before = snapshot(net, loss, SEEN, CACHE, LAST, positions, remembers.__dict__, Keeps.shared, Keeps.calls)
    with ModelParallelTrainer(
        net, ["cpu:0", "cpu:1"], loss_fn=loss, precision="fp32", microbatches=2, **settings
    ) as trainer:
        trainer.prepare(inputs, targets)
        after = snapshot(net, loss, SEEN, CACHE, LAST, positions, remembers.__dict__, Keeps.shared, Keeps.calls)
        assert before == after, difference(before, after)
        assert len(fakes()) <= len(others)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert torch.is_grad_enabled()


QUICK = ("keeps", "globals", "modules in a list", "hooks", "no copies")  # all of them measured take half a minute


@pytest.mark.parametrize(("name", "measure"), [*((n, False) for n in LAYERS), *((n, True) for n in QUICK)])
def test_a_layer_and_what_it_reaches_are_as_before(name, measure):
    reset()
    check_untouched(seeded(LAYERS[name]), None, measure=measure)


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_what_it_reaches_are_as_before(name, measure):
    check_untouched(model(nn.Tanh()), LOSSES[name](), measure=measure)


def test_hooks_on_all_modules_are_not_called():
    seen = []
    handles = [
        nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out)),
        nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(args)),
        nn.modules.module.register_module_full_backward_hook(lambda module, gi, go: seen.append(go)),
    ]
    inputs, targets = batch()
    try:
        with ModelParallelTrainer(model(nn.Tanh()), ["cpu:0"], precision="fp32", microbatches=2) as trainer:
            trainer.prepare(inputs, targets)
            assert not seen
            trainer.step(inputs, targets)
            assert seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("dropout", "random numbers")])
def test_the_first_step_is_that_of_the_plain_model(name):
    inputs, targets = batch()
    reset()
    net = seeded(LAYERS[name])
    plain = seeded(LAYERS[name])
    parameters = [p for part in (plain, *_unregistered(plain)) for p in part.parameters()]
    with ModelParallelTrainer(net, ["cpu:0", "cpu:1"], precision="fp32", microbatches=1) as trainer:
        loss, _ = trainer.forward_backward(inputs, targets)
    reset()
    expected = F.cross_entropy(plain(inputs), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0.0)
    own = [p for part in (net, *_unregistered(net)) for p in part.parameters()]
    for mine, theirs in zip(own, parameters, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def _unregistered(net):
    return getattr(net[1], "parts", [])


def test_modules_that_name_one_another_are_looked_at_once(monkeypatch):
    first, second = types.ModuleType("first"), types.ModuleType("second")
    first.second, second.first, second.count = second, first, 0
    monkeypatch.setitem(globals(), "first", first)

    def counts(h):
        first.second.first.second.count += 1
        return h

    with ModelParallelTrainer(model(Calls(counts)), ["cpu:0"], precision="fp32", microbatches=2) as trainer:
        trainer.prepare(*batch())
        assert second.count == 0
        trainer.step(*batch())
        assert second.count == 2


class Queues(nn.Module):
    """Keeps what it sees in objects of the standard library, of which not all can be put back."""

    def __init__(self, holder, keep):
        super().__init__()
        self.holder, self.keep, self.lin = holder, keep, nn.Linear(16, 16)

    def forward(self, h):
        self.keep(self.holder, h)
        return self.lin(h)


@pytest.mark.parametrize(
    ("make", "keep", "size"),
    [
        (queue.Queue, queue.Queue.put, queue.Queue.qsize),
        (collections.UserList, collections.UserList.append, len),
        (weakref.WeakKeyDictionary, lambda held, h: held.__setitem__(h, h.detach()), len),
    ],
)
def test_holders_of_the_standard_library_are_as_before(make, keep, size):
    holder = make()
    with ModelParallelTrainer(model(Queues(holder, keep)), ["cpu:0"], precision="fp32", microbatches=2) as trainer:
        trainer.prepare(*batch())
        assert size(holder) == 0


def test_what_cannot_be_taken_out_is_warned_of():
    held = queue.SimpleQueue()
    net = model(Queues(held, lambda holder, h: holder.put(h * 2)))
    with (
        ModelParallelTrainer(net, ["cpu:0"], precision="fp32", microbatches=2) as trainer,
        pytest.warns(UserWarning, match="a layer keeps tensors of planning"),
    ):
        trainer.prepare(*batch())


@pytest.mark.parametrize("measure", [False, True])
def test_nothing_is_printed(capfd, measure):
    def says(h):
        print("a layer", h.sum())
        warnings.warn("a layer warns", stacklevel=1)
        return h

    def loss(outputs, targets):
        print("a loss", F.cross_entropy(outputs, targets).item())
        return F.cross_entropy(outputs, targets)

    net, inputs = model(Calls(says)), batch()
    settings = {"precision": "fp32", "microbatches": 2, "measure": measure}
    with ModelParallelTrainer(net, ["cpu:0"], loss_fn=loss, **settings) as trainer:
        trainer.prepare(*inputs)
        assert capfd.readouterr() == ("", "")
        with pytest.warns(UserWarning, match="a layer warns"):
            trainer.step(*inputs)
    assert capfd.readouterr().out.count("a loss") == 2
