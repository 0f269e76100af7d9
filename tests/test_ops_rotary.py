"""rotary: transformers' formula on every backend, its gradient, layouts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor

from spu import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def angles(batch: int, tokens: int, head_dim: int, interleaved: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    phases = torch.arange(batch * tokens).view(batch, tokens, 1) / 10000 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    phases = phases.repeat_interleave(2, -1) if interleaved else torch.cat((phases, phases), -1)
    return phases.cos().to(dtype), phases.sin().to(dtype)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def run(function: object, q: Tensor, k: Tensor, *rest: object, **options: object) -> list[Tensor]:
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k)]
    results = function(*leaves, *rest, **options)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
    torch.autograd.backward(results, dys)
    return [*(y.detach() for y in results), *(leaf.grad for leaf in leaves)]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_error_bound_of_ragged_heads(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    for batch, heads, kv_heads, tokens, head_dim in ((1, 1, 1, 1, 2), (2, 3, 1, 5, 22), (2, 2, 2, 3, 64)):
        cos, sin = angles(batch, tokens, head_dim, interleaved, dtype)
        q, k = (torch.randn(batch, tokens, n, head_dim).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
        with ops.use_backend(backend):
            found = run(ops.rotary, q, k, cos, sin, interleaved=interleaved)
        torchs = run(plain, q, k, cos, sin, interleaved)
        truth = run(plain, *(t.double() for t in (q, k, cos, sin)), interleaved)
        assert found[0].stride() == q.stride()
        for a, b, t in zip(found, torchs, truth):
            eps = (1.5 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps * float(t.abs().max())
            assert_close_to_truth(a, b, t, eps=eps)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_fp32_angles_of_16_bit_heads_are_rounded_once(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    cos, sin = angles(2, 5, 22, interleaved, torch.float32)
    q, k = (torch.randn(2, 5, n, 22).to(dtype).transpose(1, 2) for n in (3, 1))
    with ops.use_backend(backend):
        found = run(ops.rotary, q, k, cos, sin, interleaved=interleaved)
    truth = run(plain, *(t.double() for t in (q, k, cos, sin)), interleaved)
    for i, (a, t) in enumerate(zip(found, truth, strict=True)):
        assert a.dtype == dtype
        roundings = 0.51 if i < 2 else 1.5  # of a gradient: dy's as well, which the truth has not, and of two of them
        assert float((a.double() - t).abs().max()) <= roundings * torch.finfo(dtype).eps * float(t.abs().max())
    with pytest.raises(TypeError, match="must be one of"), ops.use_backend(backend):
        ops.rotary(q.float(), k.float(), cos.to(dtype), sin.to(dtype))


@every_backend
def test_one_row_of_positions_serves_all_batches_and_strides_do_not_matter(backend: str) -> None:
    cos, sin = angles(1, 6, 16, False, torch.float32)
    base = torch.randn(3, 6, 2, 3, 16)  # as a product for q, k and v leaves them
    q, k = base[..., 0, :].transpose(1, 2), base[..., 1, :].transpose(1, 2)
    with ops.use_backend(backend):
        strided = ops.rotary(q, k, cos, sin)
        dense = ops.rotary(q.contiguous(), k.contiguous(), cos.expand(3, 6, 16), sin.expand(3, 6, 16))
        odd = ops.rotary(q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin)
    for a, b, c, t in zip(strided, dense, odd, plain(q, k, cos, sin, False)):
        assert_equal(a, b)
        assert_equal(a, c)
        torch.testing.assert_close(a, t)


@every_backend
def test_layouts_in_which_torch_puts_another_dimension_last(backend: str) -> None:
    """One token for all, behind a dimension of stride 1 (a transposed column): heads of the result would have gaps."""
    cos, sin = angles(1, 3, 8, False, torch.float32)
    q = torch.randn(2, 8).unsqueeze(-1).transpose(1, 2).unsqueeze(2).expand(2, 1, 3, 8)
    k = torch.randn(40).as_strided((2, 2, 3, 8), (4, 8, 1, 1))  # tokens that overlap
    assert torch.empty_like(q).stride(3) != 1 != torch.empty_like(k).stride(3)
    with ops.use_backend(backend):
        found = [*ops.rotary(q, k, cos, sin), *ops.rotary(k, q.contiguous(), cos, sin)]
    expected = [*plain(q, k, cos, sin, False), *plain(k, q, cos, sin, False)]
    for a, t in zip(found, expected, strict=True):
        torch.testing.assert_close(a, t)


@every_backend
def test_halves_may_have_angles_of_their_own(backend: str) -> None:
    """The backward is the transpose, also where it is no rotation."""
    q, k, cos, sin = (torch.randn(1, 2, 4, 6), torch.randn(1, 1, 4, 6), torch.randn(1, 4, 6), torch.randn(1, 4, 6))
    for interleaved in (False, True):
        with ops.use_backend(backend):
            found = run(ops.rotary, q, k, cos, sin, interleaved=interleaved)
        for a, b in zip(found, run(plain, q, k, cos, sin, interleaved)):
            torch.testing.assert_close(a, b)


@every_backend
def test_empty(backend: str) -> None:
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (1, 2, 3, 0)):
        x, cos = torch.randn(shape), torch.randn(shape[0], *shape[2:])
        with ops.use_backend(backend):
            assert ops.rotary(x, x, cos, cos)[1].shape == torch.Size(shape)


def test_gradcheck() -> None:
    q, k = torch.randn(2, 2, 3, 4).double().requires_grad_(), torch.randn(2, 1, 3, 4).double().requires_grad_()
    cos, sin = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda q, k, i=interleaved: ops.rotary(q, k, cos, sin, interleaved=i), (q, k))


def test_what_does_not_fit_is_refused() -> None:
    q, cos = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=r"cos \(1, 2, 4\)"):
        ops.rotary(q, q, cos[:, :2], cos[:, :2])
    with pytest.raises(ValueError, match="head_dim even"):
        ops.rotary(q[..., :3], q[..., :3], cos[..., :3], cos[..., :3])
    with pytest.raises(TypeError, match="cos torch.bfloat16"):
        ops.rotary(q.half(), q.half(), cos.bfloat16(), cos.bfloat16())
    with pytest.raises(ValueError, match="has a gradient"):
        ops.rotary(q, q, cos.clone().requires_grad_(), cos)
