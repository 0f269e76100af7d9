"""What ``bench.py`` measures: calls of ours and of their peers on the same values.

Ours come by backend ("spu triton", "spu cuda" where it is built), and products also by what a table may name: "spu
Triton kernel", "spu cuBLAS" (torch's product with our epilogue), "spu cuBLASLt" (with its own). Peers are plain torch
(cuBLAS), torch.compile, the step as Megatron makes it (fp16 weights, ``main_grad.add_(grad)``), SDPA by each of its
kernels and, where it is installed, Liger. "cuBLAS, bare" is the product alone, which the fused ones are to come near.
Whatever a peer cannot do raises when its call is made, and becomes a row that says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import attention_step, megatron_step, packed_attention_step
from torch import Tensor, nn

Call = Callable[[], object]
Shape = tuple[int, int, int]  # rows, out, in
_OURS = ("spu triton", "spu cuda")
_KINDS = ("spu Triton kernel", "spu cuBLAS", "spu cuBLASLt")  # configurations that the tables may name
BARE = "cuBLAS, bare"
_GIGABYTE = 1 << 30
MICROBATCHES = 4  # of a step: AMP unscales once for all of them
_PACKED = ("spu documents", "SDPA mask")
HEADS = (8, 1024, 32, 128)  # batch, tokens, heads, features of a head
STEP = f"step of {MICROBATCHES} microbatches"
MEGATRON = "torch, Megatron-style"


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        decoders: (hidden, MLP) sizes.
        tokens: rows of the decoders' products.
        squares: sides of square products.
        numel: elements of lists and wires, several times the cache.
        vocabulary: of the cross-entropy.
        compiled: shapes that torch.compile is timed on; it takes seconds for each.
    """

    device: str
    decoders: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    squares: tuple[int, ...]
    numel: int
    vocabulary: int
    compiled: tuple[Shape, ...]

    def shapes(self) -> list[Shape]:
        """Squares, and the MLP projections of the decoders: up, and at the first number of tokens also down."""
        found = [(side, side, side) for side in self.squares]
        for tokens in self.tokens:
            for hidden, inner in self.decoders:
                found.append((tokens, inner, hidden))
                if tokens == self.tokens[0]:
                    found.append((tokens, hidden, inner))
        return found

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, device=self.device) / shape[-1] ** 0.5).half()


def on_card() -> Setting:
    """MLPs of 1.8B, 7B and 20B decoders; lists of 256M elements, or what 8 GB allow."""
    memory = torch.cuda.mem_get_info()[1]
    return Setting(
        "cuda", ((4096, 14336), (2048, 8192), (6144, 16384)), (4096, 1024, 256, 16384), (8192, 4096),
        min(256 << 20, memory // _GIGABYTE * _GIGABYTE // 32), 92544,
        ((8192, 8192, 8192), (4096, 4096, 4096), (4096, 14336, 4096), (1024, 14336, 4096), (256, 14336, 4096)),
    )  # fmt: skip


def rehearsal() -> Setting:
    """Everything small and on the CPU, where interpreted kernels do the work: for typos, not for time."""
    return Setting("cpu", ((32, 48),), (24,), (32,), 1 << 12, 80, ())


class Case(NamedTuple):
    """One row: FLOPs or bytes say what it is compared with, ``make`` prepares the call that is timed."""

    group: str
    shape: str
    peer: str
    flops: float
    moved: float
    make: Callable[[], Call]


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _backend(peer: str) -> str:
    return peer.removeprefix("spu ")


def _config(peer: str, op: str, shape: Shape) -> Any:
    """Return the configuration of one of ``_KINDS`` for a product of rows, columns and inner."""
    from spu.kernels.config import Config, shape_class
    from spu.kernels.derive import of_triton

    if peer != "spu Triton kernel":
        return Config("torch" if peer == "spu cuBLAS" else "cublaslt")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return of_triton(10 * major + minor, op, "fp16", shape_class(*shape))


def _forward(at: Setting, shape: Shape, peer: str) -> Call:
    """y = gelu(x @ w.T + b) in fp16, as inference runs it."""
    from spu import kernels, ops

    rows, out, inner = shape
    x, w, b = at.random(rows, inner), at.random(out, inner), at.random(out)

    def eager() -> Tensor:
        return F.gelu(F.linear(x, w, b), approximate="tanh")

    if peer in _KINDS:
        config = _config(peer, "linear", shape)
        return lambda: kernels.linear_fwd(x, w, b, "gelu_tanh", config=config)
    if peer in _OURS:
        with ops.use_backend(_backend(peer)):
            op = getattr(torch.ops.spu.linear, _backend(peer))
        return lambda: op(x, w, b, "gelu_tanh", False)
    if peer == BARE:
        return lambda: F.linear(x, w)
    if peer == "torch addmm + gelu":
        return lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)
    return torch.compile(eager) if peer == "torch.compile" else eager


def _input_gradient(at: Setting, shape: Shape, peer: str) -> Call:
    """dx = dz @ w in fp16."""
    from spu import kernels, ops

    rows, out, inner = shape
    dz, w = at.random(rows, out), at.random(out, inner)
    if peer in _KINDS:
        config = _config(peer, "linear_dx", (rows, inner, out))
        return lambda: kernels.linear_dx(dz, w, config=config)
    if peer in _OURS:
        with ops.use_backend(_backend(peer)):
            op = getattr(torch.ops.spu.linear_dx, _backend(peer))
        return lambda: op(dz, w)
    return lambda: dz @ w


def _weight_gradient(at: Setting, shape: Shape, peer: str) -> Call:
    """main_grad += inv_scale * dz.T @ x: fp16 operands, fp32 sums. torch's: unscaled."""
    from spu import kernels, ops

    rows, out, inner = shape
    dz, x, main = at.random(rows, out), at.random(rows, inner), torch.zeros(out, inner, device=at.device)
    scale, found = torch.ones(1, device=at.device), torch.zeros(1, device=at.device)
    if peer in _KINDS:
        config = _config(peer, "linear_dw", (out, inner, rows))
        return lambda: kernels.linear_dw_(dz, x, main, scale, found, True, config=config)
    if peer in _OURS:
        with ops.use_backend(_backend(peer)):
            op = getattr(torch.ops.spu.linear_dw_, _backend(peer))
        return lambda: op(dz, x, main, scale, found, True)
    if peer == "cuBLAS, fp32 C":
        addmm = torch.ops.aten.addmm.dtype_out
        return lambda: addmm(main, dz.t(), x, torch.float32, out=main)
    if peer == BARE:
        return lambda: dz.t() @ x
    return lambda: main.add_(dz.t() @ x)


def _step(at: Setting, shape: Shape, peer: str) -> Call:
    """Forward and backward of linear + gelu for MICROBATCHES, gradients added up and unscaled in fp32."""
    rows, out, inner = shape
    x, dy = at.random(rows, inner).requires_grad_(), at.random(rows, out)
    if peer in _OURS:
        return _spu_step(x, dy, nn.Linear(inner, out).to(at.device).half(), _backend(peer))
    if peer == MEGATRON:
        return megatron_step(x, dy, nn.Linear(inner, out).to(at.device).half(), MICROBATCHES)
    layer = nn.Linear(inner, out).to(at.device)  # autocast keeps fp32 weights and gradients
    scaler = torch.amp.GradScaler(at.device, init_scale=1024.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def forward() -> Tensor:
        with torch.autocast(at.device, torch.float16):
            return F.gelu(layer(x), approximate="tanh")

    run = torch.compile(forward) if peer == "torch.compile" else forward

    def step() -> None:
        for _ in range(MICROBATCHES):
            scaler.scale((run() * dy).sum()).backward()
        scaler.unscale_(optimizer)
        scaler._per_optimizer_states.clear()  # the next call may unscale again, as after an optimizer's step

    return step


def _spu_step(x: Tensor, dy: Tensor, layer: nn.Linear, backend: str) -> Call:
    from spu import ops
    from spu.precision import LossScaler, MainGrads

    scaler, mains = LossScaler(init_scale=1024.0), MainGrads(layer.parameters())
    scaler.begin_step()
    mains.begin_step()

    def step() -> None:
        for _ in range(MICROBATCHES):
            with ops.use_backend(backend):
                y = ops.linear_act(x, layer.weight, layer.bias, "gelu_tanh")
            scaler.scale((y * dy).sum().float()).backward()

    return step


def _gated(at: Setting, shape: Shape, peer: str) -> Call:
    """Forward and backward of a SwiGLU block (tokens, inner, hidden), plain gradients."""
    from spu import ops

    rows, inner, hidden = shape
    x, dy = at.random(rows, hidden).requires_grad_(), at.random(rows, hidden)
    weights = [nn.Parameter(at.random(*size)) for size in ((inner, hidden), (inner, hidden), (hidden, inner))]
    if peer == "Liger":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def forward() -> Tensor:
        if peer in _OURS:
            with ops.use_backend(_backend(peer)):
                return ops.gated_mlp(x, *weights)
        gate, up = F.linear(x, weights[0]), F.linear(x, weights[1])
        h = LigerSiLUMulFunction.apply(gate, up) if peer == "Liger" else F.silu(gate) * up
        return F.linear(h, weights[2])

    run = torch.compile(forward) if peer == "torch.compile" else forward

    def step() -> None:
        for leaf in (x, *weights):
            leaf.grad = None
        run().backward(dy)

    return step


def _cross_entropy(at: Setting, peer: str) -> Call:
    from spu import ops
    from spu.ops.cross_entropy import cross_entropy_share

    tokens, hidden_size = at.tokens[0], at.decoders[0][0]
    hidden, weight = (
        at.random(tokens, hidden_size).requires_grad_(),
        nn.Parameter(at.random(at.vocabulary, hidden_size)),
    )
    target = torch.randint(0, at.vocabulary, (tokens,), device=at.device)
    if peer == "Liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused: Any = LigerFusedLinearCrossEntropyLoss()

    def loss() -> Tensor:
        if peer in _OURS:
            with ops.use_backend(_backend(peer)):
                share = cross_entropy_share(hidden, weight, target, 1.0)  # as a training calls it
                assert share is not None
                return share
        if peer == "Liger":
            return fused(weight, hidden, target)  # type: ignore[no-any-return]
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def step() -> None:
        hidden.grad = weight.grad = None
        (1024 * loss()).backward()

    return step


def _attention(at: Setting, peer: str) -> Call:
    batch, tokens, heads, features = HEADS if at.device == "cuda" else (1, 16, 2, 8)
    q, k, v, dy = (torch.randn(batch, tokens, heads, features, device=at.device).half() for _ in range(4))
    step = packed_attention_step if peer in _PACKED else attention_step
    return step(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy, peer)


def _pack(at: Setting, codec: str, unpack: bool, peer: str) -> Call:
    from spu import ops

    x = torch.randn(at.numel, device=at.device, dtype=torch.float16)
    with ops.use_backend(_backend(peer)):
        wire = ops.pack(x, codec)
    op = getattr(torch.ops.spu.unpack if unpack else torch.ops.spu.pack, _backend(peer))
    return (lambda: op(wire, x.shape, x.dtype, codec)) if unpack else (lambda: op(x, codec))


def _adamw(at: Setting, peer: str) -> Call:
    from spu import ops

    sizes = [at.numel // 16] * 16
    wide = [[torch.rand(n, device=at.device) for n in sizes] for _ in range(4)]
    params = [value.half() for value in wide[0]]
    if peer in _OURS:
        steps, one, zero = (
            [torch.ones(1, device=at.device) for _ in sizes],
            torch.ones(1).to(at.device),
            torch.zeros(1).to(at.device),
        )
        with ops.use_backend(_backend(peer)):
            op = getattr(torch.ops.spu.adamw_, _backend(peer))
        hyper = (one, zero, 1e-3, 0.9, 0.999, 1e-8, 0.1)
        return lambda: op(params, wide[1], wide[0], wide[2], wide[3], steps, *hyper)
    parameters = [nn.Parameter(value) for value in wide[0]]
    for parameter, grad in zip(parameters, wide[1]):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:  # what fp16 weights with fp32 masters take in plain torch
        optimizer.step()
        torch._foreach_copy_(params, [parameter.detach() for parameter in parameters])

    return step


def _grad_norm(at: Setting, peer: str) -> Call:
    from spu import ops

    grads = [torch.randn(at.numel // 16, device=at.device) for _ in range(16)]
    if peer == "torch":
        return lambda: torch.nn.utils.get_total_norm(grads, foreach=True)
    with ops.use_backend(_backend(peer)):
        op = getattr(torch.ops.spu.grad_sqnorm, _backend(peer))
    return lambda: op(grads)


def cases(at: Setting) -> Iterator[Case]:
    """Everything that is measured, what matters most first."""
    for shape in at.shapes():
        flops, compiled = 2.0 * shape[0] * shape[1] * shape[2], ["torch.compile"] if shape in at.compiled else []
        for peer in (*_OURS, *_KINDS, BARE, "torch eager (cuBLAS)", "torch addmm + gelu", *compiled):
            yield Case("forward bias+gelu", name_of(shape), peer, flops, 0.0, partial(_forward, at, shape, peer))
        for peer in (*_OURS, *_KINDS, BARE):
            yield Case("dx", name_of(shape), peer, flops, 0.0, partial(_input_gradient, at, shape, peer))
        for peer in (*_OURS, *_KINDS, BARE, "cuBLAS, fp32 C", "torch mm + add"):
            yield Case(
                "dw into main_grad", name_of(shape), peer, flops, 0.0, partial(_weight_gradient, at, shape, peer)
            )
        for peer in (*_OURS, "torch autocast", MEGATRON, *compiled):
            yield Case(STEP, name_of(shape), peer, 3 * MICROBATCHES * flops, 0.0, partial(_step, at, shape, peer))
    yield from _memory_cases(at)
    liger = ["Liger"] if importlib.util.find_spec("liger_kernel") else []
    hidden, inner = at.decoders[0]
    for tokens in dict.fromkeys((at.tokens[0], at.tokens[-1])):
        shape, compiled = (tokens, inner, hidden), ["torch.compile"] if at.compiled else []
        for peer in (*_OURS, "torch eager", *compiled, *liger):
            flops = 18.0 * tokens * inner * hidden
            yield Case("gated MLP step", name_of(shape), peer, flops, 0.0, partial(_gated, at, shape, peer))
    batch, tokens, heads, features = HEADS
    flops = 3.5 * 2 * batch * heads * tokens * tokens * features  # two products forward, five backward, half masked
    for peer in ("spu attention", "SDPA cuDNN", "SDPA flash"):
        yield Case("attention step", name_of(HEADS), peer, flops, 0.0, partial(_attention, at, peer))
    for peer in _PACKED:
        yield Case("attention of 11 documents", name_of(HEADS), peer, flops / 11, 0.0, partial(_attention, at, peer))
    shape = (at.tokens[0], at.vocabulary, hidden)
    for peer in (*_OURS, "torch eager", *liger):
        flops = 6.0 * shape[0] * shape[1] * shape[2]
        yield Case("linear cross-entropy step", name_of(shape), peer, flops, 0.0, partial(_cross_entropy, at, peer))


def _memory_cases(at: Setting) -> Iterator[Case]:
    numel = at.numel
    size = f"{numel >> 20}M"
    for codec, bits in (("fp16", 16), ("int8", 8.5), ("int4", 5), ("fp8_e4m3", 8.5)):
        for unpack in (False, True):
            group, moved = f"{'un' if unpack else ''}pack {codec}", numel * (2 + bits / 8)
            for peer in _OURS:
                yield Case(group, f"{size} fp16", peer, 0.0, moved, partial(_pack, at, codec, unpack, peer))
    for peer, each in (*((ours, 30) for ours in _OURS), ("torch fused AdamW + copy", 34)):
        yield Case("adamw", size, peer, 0.0, each * numel, partial(_adamw, at, peer))
    for peer in (*_OURS, "torch"):
        yield Case("grad_norm", size, peer, 0.0, 4.0 * numel, partial(_grad_norm, at, peer))
