"""The C++ attention ops by their overloads, against fp64 truth; "plain" is the reference backend in the same dtype.

Runs on every instruction set, like test_cpu_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth, assert_equal
from test_cpu_kernels import DTYPES, OPS
from torch import Tensor

# batch, tokens, heads, kv_heads, head_dim: single elements, ragged against panels of 4 to 32 queries and 4 to 14 keys
SHAPES = [
    (1, 1, 1, 1, 1), (2, 5, 2, 1, 3), (1, 33, 4, 2, 8), (2, 70, 2, 2, 17), (1, 129, 3, 1, 40), (1, 16, 1, 1, 130),
    (0, 4, 2, 1, 8), (1, 0, 2, 1, 8),
]  # fmt: skip
SCALE = 0.3


def operands(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, keys: int, dtype: torch.dtype) -> list:
    shapes = [(batch, tokens, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2]
    return [torch.randn(shape).mul(2).to(dtype) for shape in shapes]


def check(name: str, ours: tuple[Tensor, ...], arguments: list[Tensor], causal: bool) -> None:
    """Against spu::name.reference in the same dtype and in fp64."""
    op = getattr(OPS, name).reference
    plain, truth = op(*arguments, SCALE, causal), op(*[a.double() for a in arguments], SCALE, causal)
    for i, (one, two, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert one.is_contiguous()
        # Few elements: the reference may be exact by luck. In fp32 an exponential and a sum round more than once.
        largest = float(true.abs().max()) if true.numel() else 0.0
        eps = (4 if one.dtype == torch.float32 else 0.5) * torch.finfo(one.dtype).eps * largest
        assert_close_to_truth(one, two, true, eps=eps, name=f"{name}[{i}]")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, int, int, int, int], dtype: torch.dtype, causal: bool) -> None:
    keys = shape[1] if causal else 37
    q, k, v = operands(*shape, keys=keys, dtype=dtype)
    results = OPS.attention.cpu(q, k, v, SCALE, causal)
    check("attention", results, [q, k, v], causal)
    dout = torch.randn(q.shape).to(dtype)
    arguments = [dout, q, k, v, *results]
    check("attention_backward", OPS.attention_backward.cpu(*arguments, SCALE, causal), arguments, causal)


def test_strides() -> None:
    """Heads first, a slice of a joint projection, and a last dimension that is not contiguous."""
    q, k, v = operands(2, 21, 4, 2, 12, keys=21, dtype=torch.float16)
    dout = torch.randn(q.shape).half()
    joint = torch.cat((q, k, v), dim=2)
    others = [
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout)],
        [*joint.split((4, 2, 2), dim=2), dout],
        [torch.stack((t, t + 1), dim=-1)[..., 0] for t in (q, k, v, dout)],
    ]
    expected = OPS.attention.cpu(q, k, v, SCALE, True)
    gradients = OPS.attention_backward.cpu(dout, q, k, v, *expected, SCALE, True)
    for q2, k2, v2, dout2 in others:
        assert_equal(OPS.attention.cpu(q2, k2, v2, SCALE, True)[0], expected[0])
        for ours, same in zip(OPS.attention_backward.cpu(dout2, q2, k2, v2, *expected, SCALE, True), gradients):
            assert_equal(ours, same)


@pytest.mark.parametrize("causal", [True, False])
def test_threads_do_not_change_a_bit(causal: bool) -> None:
    q, k, v = operands(1, 100, 3, 1, 24, keys=100, dtype=torch.bfloat16)
    dout = torch.randn(q.shape).bfloat16()
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        forward = OPS.attention.cpu(q, k, v, SCALE, causal)
        results.append((*forward, *OPS.attention_backward.cpu(dout, q, k, v, *forward, SCALE, causal)))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_equal(ours, first)


def test_a_query_sees_no_later_key() -> None:
    """Not even where the later keys are not numbers; the rows that see them are none."""
    q, k, v = operands(1, 40, 2, 2, 16, keys=40, dtype=torch.float16)
    clean = OPS.attention.cpu(q, k, v, SCALE, True)[0]
    k[:, 25:] = float("nan")
    out = OPS.attention.cpu(q, k, v, SCALE, True)[0]
    assert_equal(out[:, :25], clean[:, :25])
    assert out[:, 25:].isnan().all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (t * 100 for t in operands(1, 20, 1, 1, 64, keys=20, dtype=torch.float16))
    ours = OPS.attention.cpu(q, k, v, 1.0, True)
    truth = OPS.attention.reference(q.double(), k.double(), v.double(), 1.0, True)
    assert_close_to_truth(ours[0], truth[0].half(), truth[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_below_the_normal_values_of_fp32_are_zero(dtype: torch.dtype) -> None:
    """Scores of 0, -80, -87.5, -100 and -110 below the largest: weights from 2e-35 to none."""
    q, v = torch.ones(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    k = torch.tensor([0.0, -10.0, -10.9375, -12.5, -13.75]).repeat(8).view(1, 40, 1, 1).expand(1, 40, 1, 8)
    arguments = [t.to(dtype) for t in (q, k, v)]
    out, lse = OPS.attention.cpu(*arguments, 1.0, True)
    true_out, true_lse = OPS.attention.reference(*[t.double() for t in arguments], 1.0, True)
    plain = OPS.attention.reference(*arguments, 1.0, True)[0]
    assert_close_to_truth(out, plain, true_out, eps=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), true_lse.double(), rtol=1e-6, atol=1e-6)
    dout = torch.randn(1, 40, 1, 8).to(dtype)
    ours = OPS.attention_backward.cpu(dout, *arguments, out, lse, 1.0, True)
    truth = OPS.attention_backward.reference(
        *[t.double() for t in (dout, *arguments)], true_out, true_lse.double(), 1.0, True
    )
    for one, true in zip(ours, truth, strict=True):
        largest = float(true.abs().max())
        assert_close_to_truth(one, true.to(dtype), true, eps=8 * torch.finfo(dtype).eps * max(largest, 1.0))


def test_direct_callers_are_checked() -> None:
    q, k, v = operands(1, 4, 2, 1, 8, keys=5, dtype=torch.float16)
    for arguments, text in [
        ((q, k, v, 1.0, True), "causal mask"),
        ((q, k, v[:, 1:], 1.0, False), "v has"),
        ((q[0], k, v, 1.0, False), "batch, tokens, heads, head_dim"),
        ((q, k.float(), v, 1.0, False), "float32"),
        ((q, k, v, 0.0, False), "scale 0"),
        ((q[:, :, :1].expand(1, 4, 3, 8), k.expand(1, 5, 2, 8), v.expand(1, 5, 2, 8), 1.0, False), "does not fit"),
    ]:
        with pytest.raises(Exception, match=text):
            OPS.attention.cpu(*arguments)
    out, lse = OPS.attention.cpu(q, k, v, 1.0, False)
    with pytest.raises(Exception, match="lse must be"):
        OPS.attention_backward.cpu(out, q, k, v, out, lse[:, :1], 1.0, False)
