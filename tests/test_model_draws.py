"""Every random operator is repeatable, draws of the loss and of generators of the user's own included."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from pipelines import WIDTH, assert_equals_plain, batch, every_schedule, model_of, plain_pass, trainer
from torch import nn

from spu import LayerRandomness, StageError
from spu.common import torch_private
from spu.model import draws

pytestmark = pytest.mark.usefixtures("reference")


class Fn(nn.Module):
    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, -1, 2, WIDTH // 2).transpose(1, 2)


def attention(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), dropout_p=0.5).transpose(1, 2).reshape(x.shape)


OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rand": lambda x: x + torch.rand(x.shape),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x + torch.randint(4, x.shape),
    "randint low": lambda x: x + torch.randint(1, 4, x.shape),
    "randint_like": lambda x: x + torch.randint_like(x, 4),
    "randint_like low": lambda x: x + torch.randint_like(x, 1, 4),
    "randint out": lambda x: x + torch.randint(1, 4, x.shape, out=torch.empty(x.shape, dtype=torch.long)),
    "randperm": lambda x: x[:, torch.randperm(WIDTH)],
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(),
    "cauchy_": lambda x: x + torch.empty_like(x).cauchy_().atan(),
    "geometric_": lambda x: x + torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: x + torch.empty_like(x).log_normal_(),
    "random_": lambda x: x + torch.empty_like(x).random_(3, 9),
    "random_ to": lambda x: x + torch.empty_like(x).random_(9),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "normal of means": lambda x: x + torch.normal(x.detach(), x.detach().abs()),
    "normal of mean": lambda x: x + torch.normal(x.detach(), 0.1),
    "normal of floats": lambda x: x + torch.normal(0.0, 0.1, x.shape),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "bernoulli_ of tensor": lambda x: x * torch.empty_like(x).bernoulli_(x.detach().sigmoid()),
    "poisson": lambda x: x + torch.poisson(x.detach().abs()),
    "binomial": lambda x: x + torch.binomial(torch.full_like(x, 5), x.detach().sigmoid()),
    "multinomial": lambda x: x + torch.multinomial(x.detach().softmax(-1), 3).float().mean(-1, keepdim=True),
    "gamma": lambda x: x + torch._standard_gamma(1 + x.abs()),
    "dirichlet": lambda x: x + torch._sample_dirichlet(1 + x.detach().abs()),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "hard gumbel": lambda x: F.gumbel_softmax(x, hard=True) * x,
    "dropout": lambda x: F.dropout(x, 0.4),
    "native dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "inplace dropout": lambda x: F.dropout(x + 1, 0.4, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "feature dropout": lambda x: F.dropout1d(x.view(-1, 4, 4), 0.4, True).view(x.shape),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x.view(-1, 4, 4), 0.4, True).view(x.shape),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu_": lambda x: F.rrelu(x * 2, training=True, inplace=True),
    "attention": attention,
    "pooling": lambda x: x + F.fractional_max_pool2d(x.view(-1, 1, 4, 4), 2, output_size=2).mean((1, 2, 3)).view(-1, 1),
    "normal distribution": lambda x: x + torch.distributions.Normal(x, 1.0, validate_args=False).rsample(),
    "beta distribution": lambda x: (
        x + torch.distributions.Beta(1 + x.abs(), 1.0 + x.abs(), validate_args=False).rsample()
    ),
    "categorical": lambda x: x + torch.distributions.Categorical(logits=x, validate_args=False).sample()[:, None],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_draws_what_the_plain_model_draws(name: str) -> None:
    """randint(low, high) found another overload, exponential_ (so gumbel_softmax) could not be planned for."""
    torch.manual_seed(1)
    model = model_of(Fn(OPERATORS[name]), nn.Tanh(), Fn(OPERATORS[name]))
    assert_equals_plain(model, *batch(), ranks=3, recompute=True, passes=2)


@pytest.mark.parametrize("name", OPERATORS)
def test_equal_moments_draw_equally(name: str) -> None:
    x = torch.randn(4, WIDTH)

    def run(*moment: Any) -> torch.Tensor:
        with LayerRandomness(*moment) as context:
            y = OPERATORS[name](x.clone())
        assert context.draws > 0
        return y

    state = torch.get_rng_state()
    first = run(0, 0, 0, "a")
    assert_equal(run(0, 0, 0, "a"), first)
    assert name == "pooling" or not torch.equal(run(0, 0, 1, "a"), first)
    assert_equal(torch.get_rng_state(), state)


def test_the_recurrent_nets_dropout_repeats() -> None:
    for net in (nn.LSTM, nn.GRU, nn.RNN):
        model = model_of(nn.Flatten(0), nn.Unflatten(0, (-1, 4, 4)), net(4, 4, 2, dropout=0.5, batch_first=True))
        model = nn.Sequential(*model[:-1], Fn(lambda out: out[0].flatten(1)), model[-1])
        assert_equals_plain(model, *batch(), ranks=2, recompute=True)


@every_schedule
def test_a_layer_that_draws_in_some_microbatches_only(schedule: str, ranks: int, virtual: int) -> None:
    """A layer that drew nothing in a step's first microbatch drew from the process's generator in the others."""

    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.dropout(x, 0.5) if self.calls % 4 > 1 else x

    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual}
    assert_equals_plain(model_of(Depth(), nn.Tanh(), Depth()), *batch(), passes=2, **settings)


def test_what_python_draws_does_not_decide_what_torch_draws() -> None:
    class StochasticDepth(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5) if random.random() < 0.5 else x

    def pass_of(model: nn.Sequential) -> torch.Tensor:
        random.seed(5)
        with trainer(model, 1, microbatches=8) as t:
            t.prepare(*batch())
            random.seed(5)
            return t.forward_backward(*batch())[0]

    torch.manual_seed(7)
    first = pass_of(model_of(StochasticDepth()))
    torch.rand(9)
    assert_equal(pass_of(model_of(StochasticDepth())), first)


def test_evaluate_draws_nothing_that_dropout_would() -> None:
    model = model_of(nn.Dropout(0.5), nn.AlphaDropout(0.5))
    x, y = batch()
    with trainer(model) as t:
        t.step(x, y)
        assert t.evaluate(x, y) == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-5)


# The loss


def noisy_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.dropout(outputs, 0.5), targets)


@every_schedule
def test_draws_of_the_loss(schedule: str, ranks: int, virtual: int) -> None:
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual}
    assert_equals_plain(model_of(nn.Tanh(), nn.Tanh()), *batch(), passes=2, loss_fn=noisy_loss, **settings)


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """The loss drew from the process's generator, which no checkpoint holds; a layer's own generator was replaced."""
    x, y = batch()

    def run(path: Path | None, steps: int, resume: bool) -> list[float]:
        torch.manual_seed(steps)
        model = model_of(OwnGenerator(), nn.Dropout(0.2))
        torch.rand(steps)
        with trainer(model, loss_fn=noisy_loss) as t:
            t.prepare(x, y)
            if resume:
                t.load(path)
            found = []
            for _ in range(steps):
                found += [t.step(x, y).loss, t.forward_backward(x, y)[0].item(), t.forward_backward(x, y)[0].item()]
            if not resume and path is not None:
                t.save(path)
        return found

    whole = run(None, 4, False)
    assert run(tmp_path / "c", 2, False) + run(tmp_path / "c", 2, True) == whole


# Passes without an update


def test_each_forward_backward_draws_afresh() -> None:
    """The step never advanced: every pass had the same mask."""
    x, y = batch()
    model = model_of(nn.Dropout(0.5))
    with trainer(model) as t:
        losses = [t.forward_backward(x, y)[0].item() for _ in range(4)]
        assert len(set(losses)) == 4
        assert (t.passes_done, t.steps_done) == (4, 0)
        assert losses[3] == plain_pass(model, x, y, 4, F.cross_entropy, 3).item()
        expected = plain_pass(model, x, y, 4, F.cross_entropy, 4)
        assert t.step(x, y).loss == expected.item()
        assert (t.passes_done, t.steps_done) == (5, 1)


# Generators of the user's own


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape, generator=self.generator) + torch.empty_like(x).normal_(generator=self.generator)
        return x * noise + torch.poisson(torch.ones_like(x), self.generator)


@pytest.mark.parametrize("recompute", [False, True])
@every_schedule
def test_a_layers_own_generator_is_drawn_from(schedule: str, ranks: int, virtual: int, recompute: bool) -> None:
    model = model_of(OwnGenerator(), nn.Tanh(), OwnGenerator())
    settings = {"schedule": schedule, "ranks": ranks, "virtual": virtual, "recompute": recompute}
    state = model[1].generator.get_state()
    assert_equals_plain(model, *batch(), passes=2, **settings)
    assert not torch.equal(model[1].generator.get_state(), state)


def test_one_generator_in_two_stages_is_refused() -> None:
    model = model_of(OwnGenerator(), nn.Tanh(), OwnGenerator())
    model[3].generator = model[1].generator
    with (
        trainer(model, 5) as t,
        pytest.raises(ValueError, match=r"'1.generator' and '3.generator' are one torch.Generator, in stages 1 and 3"),
    ):
        t.prepare(*batch())
    assert_equals_plain(model, *batch(), ranks=1, recompute=True)


def test_a_generator_that_no_checkpoint_could_hold_is_refused() -> None:
    outside = torch.Generator()
    model = model_of(Fn(lambda x: x + torch.rand(x.shape, generator=outside)))
    with trainer(model) as t, pytest.raises(StageError, match=r"layer '1' draws from a generator.*self.generator ="):
        t.step(*batch())

    def seeded(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(3))

    assert_equals_plain(model_of(Fn(seeded)), *batch(), recompute=True)


def test_torchs_attention_on_the_cpu_draws_nothing_itself() -> None:
    q = torch.randn(1, 2, 8, 16)
    with LayerRandomness(0, 0, 0, "a") as context:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        with pytest.raises(RuntimeError, match="do not support dropout"):  # else `_NO_DRAWS` is wrong
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)
    assert context.draws == 0


def test_a_device_has_one_generator_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another name it had a second one with the same seed: a layer drew the same numbers twice."""
    with LayerRandomness(0, 0, 0, "a"):
        first, second = torch.rand(8, device="cpu:0"), torch.rand(8)
    assert not torch.equal(first, second)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert draws._device_of((), {"device": "cuda"}) == torch.device("cuda:1")
    assert draws._device_of((), {"device": torch.device("cuda:0")}) == torch.device("cuda:0")


class OnGpu:
    """A generator of the CPU that says it is a GPU's."""

    device = torch.device("cuda:0")

    def __init__(self, seed: int) -> None:
        self.real = torch.Generator().manual_seed(seed)

    def get_state(self) -> torch.Tensor:
        return self.real.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self.real.set_state(state)


def test_a_gpus_default_generator_is_lent_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a training with fused dropout the user's own draws on the GPU were those of its last layer."""
    default, own, expected = OnGpu(1), OnGpu(2), OnGpu(2)
    before = default.get_state()
    monkeypatch.setattr(draws, "_real", (torch.default_generator, (default,)))
    drawn = [draws._from_default(own, torch.rand, (4,), {"generator": default.real}) for _ in range(2)]
    assert_equal(torch.stack(drawn), torch.rand(8, generator=expected.real).view(2, 4))
    assert_equal(default.get_state(), before)
    assert_equal(own.get_state(), expected.get_state())


def test_a_thread_of_the_users_draws_for_itself_while_a_gpus_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads the next batch found the generator of the layer whose backward ran in the state of its own."""
    source, seen = LayerRandomness(0, 0, 0, "a"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(draws, "_ON_GPU", {0: source})

    def look(autograds: bool) -> None:
        torch_private.include_generic_key(autograds)  # as autograd does in its own threads
        seen.append(draws._source())

    for autograds in (False, True):
        thread = threading.Thread(target=look, args=(autograds,))
        thread.start()
        thread.join()
    assert seen == [None, source]


def test_a_generator_of_ones_own_in_a_backward_is_refused() -> None:
    generator = torch.Generator()

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient + torch.rand(gradient.shape, generator=generator)

    model = model_of(Fn(Noise.apply), nn.Tanh())
    with trainer(model) as t, pytest.raises(StageError, match=r"layer '1' draws from a generator.*in the backward"):
        t.step(*batch())
    model = model_of(Fn(lambda x: x + torch.rand(x.shape, generator=torch.default_generator)))
    assert_equals_plain(model, *batch())
