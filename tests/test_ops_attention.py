"""spu.ops.attention: values and gradients against truth and torch's own, compile, what is refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_close_to_truth
from op_checks import assert_registered, with_grads
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spu import ops
from spu.ops import schema
from spu.ops.attention import preferred_kernels, unshared_heads

attention_module = sys.modules["spu.ops.attention"]  # the package's own name is the function's


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def operands(dtype: torch.dtype, tokens: int = 45, keys: int = 45) -> list[Tensor]:
    shapes = [(2, tokens, 4, 20), *[(2, keys, 2, 20)] * 2]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("causal", "scale", "keys"), [(True, None, 45), (False, 0.7, 45), (False, None, 13)])
def test_error_bound(backend: str, dtype: torch.dtype, causal: bool, scale: float | None, keys: int) -> None:
    tensors, dout = operands(dtype, keys=keys), torch.randn(2, 45, 4, 20).to(dtype)
    with ops.use_backend(backend):
        ours = with_grads(lambda q, k, v: ops.attention(q, k, v, scale=scale, causal=causal), tensors, dout)
    torchs = with_grads(plain, tensors, dout, causal, scale)
    truth = with_grads(plain, [t.double() for t in tensors], dout.double(), causal, scale)
    for name, *three in zip(("out", "q", "k", "v"), ours, torchs, truth, strict=True):
        assert_close_to_truth(*three, name=name)


def test_double_takes_torchs_own() -> None:
    tensors = operands(torch.float64, 5, 5)
    torch.testing.assert_close(ops.attention(*tensors, causal=True), plain(*tensors, True, None))


@pytest.mark.skipif(not ops.backends()["cpu"].available, reason="torch's own attention serves")
def test_needs_no_gradient_and_has_no_second_one() -> None:
    q, k, v = operands(torch.float16)
    assert not ops.attention(q, k, v, causal=True).requires_grad
    out = ops.attention(q.requires_grad_(), k, v, causal=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.float().sum(), q, create_graph=True)


@pytest.mark.leaks_threads  # the compiler's
def test_compiles_whole() -> None:
    tensors, dout = operands(torch.float16), torch.randn(2, 45, 4, 20).half()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(with_grads(compiled, tensors, dout), with_grads(function, tensors, dout), strict=True):
        torch.testing.assert_close(ours, eager)


@every_backend
def test_opcheck(backend: str) -> None:
    q, k, v = operands(torch.float16, 9, 9)
    forward = schema.overload("attention", backend)
    out, lse = forward(q, k, v, 0.5, True)
    assert_registered(
        backend, ("attention", q, k, v, 0.5, True), ("attention_backward", out, q, k, v, out, lse, 0.5, True)
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda q, k, v: (q, k[..., :3], v), ValueError, "do not fit"),
        (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "divides"),
        (lambda q, k, v: (q[:, :7], k, v), ValueError, "causal needs as many keys"),
        (lambda q, k, v: (q, k.float(), v), TypeError, "float32"),
        (lambda q, k, v: (q, k, v.to("meta")), ValueError, "meta"),
    ],
)
def test_refused(change, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.attention(*change(*operands(torch.float16)), causal=True)
    with pytest.raises(ValueError, match="scale is -1"):
        ops.attention(*operands(torch.float16), scale=-1)


class OnHopper:
    """What `preferred_kernels` asks a tensor, of one on a Hopper GPU."""

    is_cuda, dtype, device = True, torch.float16, torch.device("cuda", 7)


def enabled() -> list[bool]:
    switches = torch.backends.cuda
    return [
        switches.cudnn_sdp_enabled(), switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(),
        switches.math_sdp_enabled(),
    ]  # fmt: skip


def test_cudnn_comes_first_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    @contextlib.contextmanager
    def recorded(backends: list[SDPBackend], set_priority: bool) -> Iterator[None]:
        asked.append((backends, set_priority))
        with sdpa_kernel(backends, set_priority=set_priority):
            yield

    monkeypatch.setattr(attention_module, "sdpa_kernel", recorded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 7 else (8, 0))
    q, ampere = OnHopper(), OnHopper()
    ampere.device = torch.device("cuda", 6)
    with preferred_kernels(torch.ones(1)), preferred_kernels(ampere):
        assert not asked
    before = enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with preferred_kernels(q):
            assert enabled() == [True, False, True, True]
        assert enabled() == [True, False, True, True], "a switch of the user's was changed"
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert asked == [(order, True)]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with preferred_kernels(q):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert len(asked) == 1
    assert enabled() == before


class OnCard(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def on_card(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16).as_subclass(OnCard)


@pytest.mark.parametrize("flash", [True, False])
def test_shared_heads_are_kept_where_flash_kernels_take_them(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ampere torch has none, and its other kernels take no shared heads: it made the matrix of scores."""
    asked: list[tuple[torch.Size, torch.Size]] = []
    monkeypatch.setattr(
        attention_module, "_has_flash", lambda q, k, v: asked.append((q.shape, k.shape)) is None and flash
    )
    q, k, v = on_card(2, 6, 5, 8), on_card(2, 3, 5, 8), on_card(2, 3, 5, 8)
    key, value = unshared_heads(q, k, v)
    assert asked == [(q.shape, k.shape)]
    if flash:
        assert (key, value) == (k, v)
        return
    for made, given in ((key, k), (value, v)):
        assert torch.equal(made, given[:, [0, 0, 1, 1, 2, 2]])
    assert unshared_heads(q, key, value) == (key, value)  # each has its own
    plain = [x.as_subclass(torch.Tensor) for x in (q, k, v)]
    assert unshared_heads(*plain) == (plain[1], plain[2])  # on a CPU
    wide = [x.float() for x in (q, k, v)]
    assert unshared_heads(*wide) == (wide[1], wide[2])
    assert len(asked) == 1


def test_torchs_attention_gets_what_its_fast_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[int] = []
    monkeypatch.setattr(attention_module, "unshared_heads", lambda q, k, v: (k.repeat_interleave(2, 1), v[:, [0, 0]]))
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **how: heads.extend(x.shape[1] for x in (k, v)) or q,
    )
    attention_module._torch_attention(*(torch.randn(1, 4, n, 8) for n in (2, 1, 1)), 1.0, True)
    assert heads == [2, 2]
