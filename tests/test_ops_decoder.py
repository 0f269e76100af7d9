"""The halves of a decoder layer: results and gradients beside the truth, and which gradients are made."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from op_checks import gradients, leaves_of
from test_ops_rotary import angles, plain
from torch import Tensor

from spu.ops import backends
from spu.ops.decoder import AttentionForm, AttentionWeights, GatedForm, NormForm, attention_half, gated_half

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
NORM = NormForm(1e-5, 0.0, False)
DTYPES = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
WIDTH, DIM, HEADS, KV_HEADS, INNER = 24, 6, 4, 2, 40


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if i > 1 else 1) for i, shape in enumerate(shapes)
    ]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, NORM.eps)


def plain_attention(x: Tensor, norm: Tensor, w: list[Tensor], b: list[Any], turn: Any, mask: Any = None) -> Tensor:
    n = plain_norm(x, norm)
    q, k, v = (F.linear(n, w[i], b[i]).unflatten(-1, (-1, DIM)).transpose(1, 2) for i in range(3))
    q, k = plain(q, k, *turn)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(2), w[3], b[3])


@pytest.mark.parametrize(("wide", "narrow"), DTYPES, ids=str)
@pytest.mark.parametrize("biases", [(), (0, 1, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("lengths", [None, [[3, 1, 3], [5]]], ids=["whole rows", "documents and padding"])
def test_attention_half(
    wide: torch.dtype, narrow: torch.dtype, biases: tuple[int, ...], interleaved: bool, lengths: Any
) -> None:
    heads, kv = HEADS * DIM, KV_HEADS * DIM
    shapes = ((heads, WIDTH), (kv, WIDTH), (kv, WIDTH), (WIDTH, heads))
    values = tensors((2, 7, WIDTH), (WIDTH,), *shapes, *((shapes[i][0],) for i in biases))
    cos, sin = angles(1, 7, DIM, interleaved, wide)
    mask = None
    if lengths is not None:
        mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths[0])).expand(2, 1, 7, 7).clone().bool()
        mask[1, 0] = torch.ones(7, 7).tril().bool() & (torch.arange(7) < lengths[1][0])

    def places(given: list[Tensor]) -> list[Any]:
        return [given[biases.index(i)] if i in biases else None for i in range(4)]

    def run_plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = leaves_of([value.to(wide) for value in values], dtype)
        x, norm, *rest = leaves
        turn = cos.to(dtype), sin.to(dtype), interleaved
        y = plain_attention(x, norm, rest[:4], places(rest[4:]), turn, mask)
        return gradients(y, leaves)

    leaves = leaves_of(values, wide)
    x, norm, *rest = leaves
    form = AttentionForm(NORM, narrow, "cpu", DIM, DIM**-0.5, interleaved, lengths)
    found = gradients(attention_half(x, norm, AttentionWeights(*rest[:4], *places(rest[4:])), cos, sin, form), leaves)
    for i, (a, b, truth) in enumerate(zip(found, run_plain(narrow), run_plain(torch.float64), strict=True)):
        assert a.dtype == wide
        assert_close_to_truth(a, b.to(wide), truth, eps=torch.finfo(narrow).eps * float(truth.abs().max()), name=str(i))


@pytest.mark.parametrize(("wide", "narrow"), DTYPES, ids=str)
def test_gated_half(wide: torch.dtype, narrow: torch.dtype) -> None:
    values = tensors((2, 7, WIDTH), (WIDTH,), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))

    def run_plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = leaves_of([value.to(wide) for value in values], dtype)
        x, norm, gate, up, down = leaves
        n = plain_norm(x, norm)
        return gradients(x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down), leaves)

    leaves = leaves_of(values, wide)
    x, norm, gate, up, down = leaves
    found = gradients(gated_half(x, norm, gate, up, down, GatedForm(NORM, narrow, "cpu", "silu")), leaves)
    for i, (a, b, truth) in enumerate(zip(found, run_plain(narrow), run_plain(torch.float64), strict=True)):
        assert a.dtype == wide
        assert_close_to_truth(a, b.to(wide), truth, eps=torch.finfo(narrow).eps * float(truth.abs().max()), name=str(i))


@pytest.mark.parametrize("needs", list(product([False, True], repeat=4)), ids=str)
def test_only_what_is_wanted_is_made(needs: tuple[bool, ...]) -> None:
    """Of x, the norm, k's weight and o's bias."""
    square = (WIDTH, WIDTH)
    values = tensors((1, 5, WIDTH), (WIDTH,), square, square, square, square, (WIDTH,))
    cos, sin = angles(1, 5, DIM, False, torch.float32)
    form = AttentionForm(NORM, torch.bfloat16, "cpu", DIM, DIM**-0.5, False)

    def run(wanted: dict[int, bool]) -> list[Tensor]:
        given = [value.clone().requires_grad_(wanted.get(i, False)) for i, value in enumerate(values)]
        weights = AttentionWeights(*given[2:6], None, None, None, given[6])
        y = attention_half(given[0], given[1], weights, cos, sin, form)
        if y.requires_grad:
            y.sum().backward()
        return given

    places = (0, 1, 3, 6)
    found, whole = run(dict(zip(places, needs, strict=True))), run(dict.fromkeys(places, True))
    for i in range(7):
        wanted = i in places and needs[places.index(i)]
        assert (found[i].grad is None) == (not wanted)
        if wanted:
            assert_equal(found[i].grad, whole[i].grad, str(i))  # type: ignore[arg-type]
