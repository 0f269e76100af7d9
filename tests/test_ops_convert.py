"""Our pass between fp32 and the 16-bit dtypes: the values of torch's own, for every value."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_equal
from test_nn_decoder import IDS, decoder, loss_of
from torch import Tensor, nn

import spu
from spu.ops import backends, convert, copy_in, linear_act
from spu.ops.convert import narrowed, same_weights, stacked

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
HALVES = [torch.float16, torch.bfloat16]


def values() -> Tensor:
    """Every upper half of an fp32 with lower halves around the ties of both dtypes: NaN, infinities, subnormals."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).view(torch.float32)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_converted_as_by_torch(dtype: torch.dtype) -> None:
    x = values()
    found = narrowed(x, dtype)
    assert_equal(found, x.to(dtype))
    assert_equal(found.signbit() & ~found.isnan(), x.to(dtype).signbit() & ~x.isnan())  # -0
    half = every_half(dtype)
    for other in (torch.float32, *HALVES):
        assert_equal(narrowed(half, other), half.to(other))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 4096, 70001])
def test_sizes_and_strides(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size)
    assert_equal(narrowed(x, dtype), x.to(dtype))
    assert narrowed(x, torch.float32) is x
    wide = torch.randn(70, 2 * size)
    for given in (wide[:, ::2], wide.t(), wide.double()):
        assert_equal(narrowed(given, dtype), given.to(dtype))
    parts = [torch.randn(rows, size) for rows in (3, 1, 5)]
    for group in (parts, [part.to(dtype) for part in parts], [parts[0].t().contiguous().t(), *parts[1:]]):
        assert_equal(stacked(group, dtype), torch.cat([part.to(dtype) for part in group]))
    for part, target in zip(parts, targets := [torch.empty_like(part, dtype=dtype) for part in parts], strict=True):
        version = target._version
        copy_in([part], [target])
        assert target._version > version
    assert_equal(torch.cat(targets), torch.cat(parts).to(dtype))


def test_autograd_sees_a_conversion_of_torchs_where_it_records() -> None:
    """A wide operand of an op without a gradient of its own to take: nothing is lost."""
    weight, x = nn.Parameter(torch.randn(80, 64)), torch.randn(128, 64, requires_grad=True)
    y = linear_act(x, weight, dtype=torch.bfloat16)
    y.float().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.no_grad():
        assert_equal(linear_act(x, weight, dtype=torch.bfloat16), y.detach())


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the parameters that were converted, in turn."""
    made: list[tuple[int, ...]] = []
    for name in ("_converted", "_one_below_the_other"):
        make = getattr(convert, name)

        def count(parts: Any, dtype: torch.dtype, make: Callable[..., Tensor] = make) -> Tensor:
            made.extend(tuple(part.shape) for part in parts if type(part) is nn.Parameter)
            return make(parts, dtype)

        monkeypatch.setattr(convert, name, count)
    return made


def step(model: Any) -> list[Tensor]:
    """Return the gradients of three microbatches, added up."""
    model.zero_grad()
    for shift in range(3):
        loss_of(model, (IDS + shift) % 64).backward()
    return [parameter.grad for parameter in model.parameters()]


def change_by_optimizer(model: Any) -> None:
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def change_by_fused_optimizer(model: Any) -> None:
    spu.optim.AdamW(model.parameters(), lr=0.5).step()


def copy_over(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 2)


def give_other_memory(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def replace_parameters(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 2))


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_inside_same_weights_each_is_converted_once(family: str, conversions: list[tuple[int, ...]]) -> None:
    model = spu.accelerate(decoder(family), "bf16")
    expected = step(copy.deepcopy(model))
    often = len(conversions)
    conversions.clear()
    with same_weights():
        found = step(model)
        assert len(conversions) == often // 3
        step(model)
        with same_weights(False):
            step(model)
        assert len(conversions) == often // 3 + often
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)
    conversions.clear()
    step(model)
    assert len(conversions) == often


@pytest.mark.parametrize(
    "change", [change_by_optimizer, change_by_fused_optimizer, copy_over, give_other_memory, replace_parameters]
)
def test_a_weight_that_changes_meanwhile_is_converted_again(change: Callable[[Any], None]) -> None:
    model = spu.accelerate(decoder(), "bf16")
    plain = copy.deepcopy(model)
    with same_weights():
        step(model)
        change(model)
        found = step(model)
    step(plain)
    change(plain)
    for a, b in zip(found, step(plain), strict=True):
        assert_equal(a, b)


def test_what_was_kept_is_let_go_of() -> None:
    weight, made = nn.Parameter(torch.randn(80, 64)), []
    with same_weights(), torch.no_grad():
        made = [narrowed(weight, dtype) for dtype in (torch.float16, torch.bfloat16)]
        assert narrowed(weight, torch.float16) is made[0]
        assert stacked([weight, weight], torch.float16) is stacked([weight, weight], torch.float16)
        other = nn.Parameter(torch.randn(80, 64))
        gone = weakref.ref(narrowed(other, torch.float16))
        del other
        gc.collect()
        assert gone() is None
        kept = weakref.ref(made.pop())
        assert kept() is not None
    assert kept() is None
    with torch.no_grad():
        assert narrowed(weight, torch.float16) is not made[0]


def test_what_is_no_parameter_or_may_be_recorded_is_not_kept() -> None:
    weight, x = nn.Parameter(torch.randn(80, 64)), torch.randn(80, 64)
    with same_weights():
        with torch.no_grad():
            assert narrowed(x, torch.float16) is not narrowed(x, torch.float16)
        with torch.inference_mode():
            assert narrowed(weight, torch.float16).is_inference()
        with torch.no_grad():
            assert not narrowed(weight, torch.float16).is_inference()
        assert narrowed(weight, torch.float16) is not narrowed(weight, torch.float16)


class Probe(nn.Linear):
    """Says whether conversions are kept where it runs."""

    seen: list[bool]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(convert._CONVERSIONS.get() is not None)
        return super().forward(x)


def test_a_trainer_inside_converts_always() -> None:
    """A streamed stage's weights are other ones in the same memory at its next visit."""
    probe = Probe(4, 4)
    probe.seen = []
    settings: Any = {"devices": ["cpu:0"], "precision": "fp32", "lr": 0.1, "loss_fn": nn.functional.mse_loss}
    with same_weights(), spu.ModelParallelTrainer([probe], **settings) as trainer:
        probe(torch.ones(2, 4))
        assert probe.seen == [True]
        for _ in range(2):
            trainer.step(torch.ones(2, 4), torch.ones(2, 4))
        trainer.evaluate(torch.ones(2, 4), torch.ones(2, 4))
        probe(torch.ones(2, 4))
    assert len(probe.seen) > 4
    assert [probe.seen[0], *probe.seen[-1:]] == [True, True]
    assert not any(probe.seen[1:-1])
