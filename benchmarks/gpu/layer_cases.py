"""Cases of what stands between the products: an MLP without a gate, norms, rotary positions, an embedding's gradient.

Each is a step, forward and backward, as a training runs it: inside a loss scale, weights into fp32 main gradients. The
peers are plain torch with fp16 weights, whose gradients are fp16 and neither scaled back nor added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import Call, Case, Setting, name_of
from torch import Tensor, nn

__all__ = ["layer_cases"]

_OURS = ("spu triton", "spu cuda")
_HEADS, _FEATURES = 32, 128


def _step(peer: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor) -> Call:
    """Return forward and backward: ours by a backend, into main gradients; torch's into ``grad``."""
    if peer not in _OURS:
        run = torch.compile(forward) if peer == "torch.compile" else forward

        def plain() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(dy)

        return plain
    from spu import ops
    from spu.precision import LossScaler, MainGrads

    scaler, mains = LossScaler(init_scale=1024.0), MainGrads([p for p in leaves if isinstance(p, nn.Parameter)])
    scaler.begin_step()
    mains.begin_step()

    def step() -> None:
        for leaf in leaves:
            if not isinstance(leaf, nn.Parameter):
                leaf.grad = None
        with ops.use_backend(peer.removeprefix("spu ")):
            y = forward()
        scaler.scale((y * dy).sum().float()).backward()

    return step


def _mlp(at: Setting, rows: int, peer: str) -> Call:
    """Linear, gelu, linear, as in GPT-2, with biases."""
    from spu import ops

    hidden, inner = at.decoders[0]
    x, dy = at.random(rows, hidden).requires_grad_(), at.random(rows, hidden)
    sizes = ((inner, hidden), (inner,), (hidden, inner), (hidden,))
    w_in, b_in, w_out, b_out = (nn.Parameter(at.random(*size)) for size in sizes)

    def forward() -> Tensor:
        if peer in _OURS:
            return ops.mlp(x, w_in, b_in, w_out, b_out, "gelu_tanh")
        return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)

    return _step(peer, forward, (x, w_in, b_in, w_out, b_out), dy)


def _norm(at: Setting, kind: str, peer: str) -> Call:
    from spu import ops

    rows, width = at.tokens[0], at.decoders[0][0]
    x, dy = at.random(rows, width).requires_grad_(), at.random(rows, width)
    weight, bias = (nn.Parameter(at.random(width)) for _ in range(2))

    def forward() -> Tensor:
        found: Any
        if kind == "rms_norm":
            found = ops.rms_norm(x, weight, 1e-6) if peer in _OURS else F.rms_norm(x, (width,), weight, 1e-6)
        elif peer in _OURS:
            found = ops.layer_norm(x, weight, bias)
        else:
            found = F.layer_norm(x, (width,), weight, bias)
        return found  # type: ignore[no-any-return]

    return _step(peer, forward, (x, weight) if kind == "rms_norm" else (x, weight, bias), dy)


def _rotary(at: Setting, peer: str) -> Call:
    """Queries and a quarter as many keys, in the layout that a projection leaves."""
    from spu import ops

    tokens = min(1024, at.tokens[0])
    heads, features = (_HEADS, _FEATURES) if at.device == "cuda" or tokens >= 256 else (4, 8)
    batch = max(1, at.tokens[0] // tokens)
    q, k = (
        at.random(batch, tokens, count, features).transpose(1, 2).detach().requires_grad_()
        for count in (heads, max(1, heads // 4))
    )
    angle = torch.rand(1, tokens, features, device=at.device)
    cos, sin = angle.cos().half(), angle.sin().half()
    dy = at.random(batch, tokens, heads, features).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    def forward() -> Tensor:
        found = ops.rotary(q, k, cos, sin) if peer in _OURS else (turned(q), turned(k))
        return found[0] + found[1].repeat(1, heads // found[1].shape[1], 1, 1)

    return _step(peer, forward, (q, k), dy)


def _embedding(at: Setting, peer: str) -> Call:
    """The gradient alone: one microbatch's rows into a table's."""
    from spu import ops

    rows, width = at.tokens[0], at.decoders[0][0]
    ids = torch.randint(0, at.vocabulary, (rows,), device=at.device)
    dy, main = at.random(rows, width), torch.zeros(at.vocabulary, width, device=at.device)
    if peer in _OURS:
        into = (main, torch.ones(1, device=at.device), torch.zeros(1, device=at.device), True)
        with ops.use_backend(peer.removeprefix("spu ")):
            op = getattr(torch.ops.spu.embedding_dw_, peer.removeprefix("spu "))
        return lambda: op(dy, ids, -1, *into)
    if peer == "torch index_add_":
        return lambda: main.index_add_(0, ids, dy.float())
    backward = torch.ops.aten.embedding_dense_backward
    return lambda: main.add_(backward(dy, ids, at.vocabulary, -1, False))


def layer_cases(at: Setting) -> Iterator[Case]:
    """Yield every case, what matters most first."""
    hidden, inner = at.decoders[0]
    compiled = ["torch.compile"] if at.compiled else []
    for rows in dict.fromkeys((at.tokens[0], at.tokens[-1])):
        for peer in (*_OURS, "torch eager", *compiled):
            flops, shape = 12.0 * rows * inner * hidden, name_of((rows, inner, hidden))
            yield Case("MLP step", shape, peer, flops, 0.0, partial(_mlp, at, rows, peer))
    rows = at.tokens[0]
    for kind in ("rms_norm", "layer_norm"):
        for peer in (*_OURS, "torch eager", *compiled):
            moved = 2.0 * 5 * rows * hidden  # x, y; x, dy, dx
            yield Case(f"{kind} step", name_of((rows, hidden)), peer, 0.0, moved, partial(_norm, at, kind, peer))
    for peer in (*_OURS, "torch eager", *compiled):
        moved = 2.0 * 4 * 1.25 * rows * _HEADS * _FEATURES  # both ways, in and out
        yield Case("rotary step", name_of((rows, _HEADS, _FEATURES)), peer, 0.0, moved, partial(_rotary, at, peer))
    for peer in (*_OURS, "torch index_add_", "torch dense + add"):
        moved = 10.0 * rows * hidden  # a row of dy, a row of main_grad both ways
        name = name_of((rows, at.vocabulary, hidden))
        yield Case("embedding gradient", name, peer, 0.0, moved, partial(_embedding, at, peer))
