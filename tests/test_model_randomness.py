"""Random draws depend on seed, step, microbatch and layer name, and on nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from together import together

from spu import LayerRandomness
from spu.model.randomness import layer_seed


def draws(*moment: object) -> torch.Tensor:
    with LayerRandomness(*moment):
        return torch.cat([F.dropout(torch.ones(64), 0.5), torch.rand(8), torch.randn(8)])


def test_equal_moments_draw_equally_and_each_part_of_the_key_matters() -> None:
    base = draws(0, 1, 2, "layers.3")
    assert_equal(draws(0, 1, 2, "layers.3"), base)
    for other in [(1, 1, 2, "layers.3"), (0, 2, 2, "layers.3"), (0, 1, 3, "layers.3"), (0, 1, 2, "layers.4")]:
        assert not torch.equal(draws(*other), base), other
    assert layer_seed(0, 1, 2, "a") == layer_seed(0, 1, 2, "a")
    assert 0 <= layer_seed(5, 6, 7, "b") < 2**63


def test_the_default_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first = draws(0, 0, 0, "a")
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_equal(draws(0, 0, 0, "a"), first)
    torch.manual_seed(0)
    draws(0, 0, 0, "a")
    assert_equal(torch.get_rng_state(), state)


def test_threads_do_not_disturb_each_other() -> None:
    expected = {name: draws(0, 0, 0, name) for name in "abcd"}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in expected}

    def work(name: str) -> None:
        found[name].extend(draws(0, 0, 0, name) for _ in range(50))

    together(*(partial(work, name) for name in expected))
    for name, values in found.items():
        for value in values:
            assert_equal(value, expected[name], name)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_keeps_its_share_and_its_scale(p: float) -> None:
    x = torch.ones(100_000, requires_grad=True)
    with LayerRandomness(0, 0, 0, "a") as context:
        y = F.dropout(x, p)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.01)
    if p < 1:
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.sum().backward()
    assert_equal(x.grad, y.detach())
    assert context.draws == (0 if p in (0.0, 1.0) else 1)


def test_attention_dropout_repeats() -> None:
    q = torch.randn(1, 2, 8, 16)

    def run() -> torch.Tensor:
        with LayerRandomness(0, 0, 0, "attention") as context:
            out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert context.draws > 0
        return out

    assert_equal(run(), run())


def test_a_layer_without_draws_says_so() -> None:
    with LayerRandomness(0, 0, 0, "a") as context:
        torch.nn.Linear(4, 4)(torch.ones(2, 4))  # its initialisation draws
    assert context.draws > 0
    linear = torch.nn.Linear(4, 4)
    with LayerRandomness(0, 0, 0, "a") as context:
        linear(torch.ones(2, 4))
    assert context.draws == 0
