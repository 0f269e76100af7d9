"""The fuzzer's menu of layers: small, and each of a kind that has gone wrong in some trainer.

Every entry makes one or more layers that take [rows, WIDTH] or [rows, LENGTH, WIDTH] and return the same shape. Whoever
changes its input in place, hands on aliases, draws, keeps statistics or runs code of its own stands here, so that the
fuzzer puts stage boundaries, recomputation and microbatches between all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spu

__all__ = ["JUMPS", "LENGTH", "WIDTH", "as_plain", "draw_layers"]

WIDTH, LENGTH = 8, 3


class Call(nn.Module):
    """A function as a layer, with a parameter so that there is something to train."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.gain = nn.Parameter(torch.randn(WIDTH) * 0.2 + 1)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.gain)


class Checkpointed(nn.Module):
    """Checkpoints a block with dropout by itself; `checkpointing` off is the same function, run once."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = True
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)

    def _block(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.dropout(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._block, x, use_reentrant=False)
        return self._block(x)


class RunningMean(nn.Module):
    """A buffer that every microbatch changes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().float().reshape(-1, WIDTH).mean(0), 0.5)
        return torch.tanh((x - self.mean) * self.gain)


class Rotary(nn.Module):
    """A complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2) * 0.7))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turn).flatten(-2).to(y.dtype)


class Constants(nn.Module):
    """Floating buffers that 16 bits cannot hold, and an integer one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("third", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("large", torch.tensor(1e6))
        self.register_buffer("position", torch.arange(4096.0, 4096.0 + WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        turned = torch.sin(self.position * 0.37).to(x.dtype)
        return x * self.gain * (self.third * 3).to(x.dtype) + turned * (self.large / 1e6).to(x.dtype)


class Masked(nn.Module):
    """Softmax under a mask buffer of -inf."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(WIDTH).masked_fill(torch.arange(WIDTH) > WIDTH - 3, low))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + (y + self.mask.to(y.dtype)).softmax(-1)


class HandsMask(nn.Module):
    """Hands on a float mask of -inf, integers and a number beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        mask = torch.zeros(WIDTH, dtype=x.dtype).masked_fill(torch.arange(WIDTH) > 5, -torch.inf)
        return x * 1.5, mask.expand(x.shape), torch.arange(WIDTH).expand(x.shape), 2


class TakesMask(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        x, mask, order, factor = given
        return x + (x + mask).softmax(-1) * factor + (order % 2).to(x.dtype)


class HandsAlias(nn.Module):
    """Hands on a tensor twice, or with a view of it."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return (h, h[..., : WIDTH // 2]) if self.part else (h, h)


class TakesAlias(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        whole, alias = given
        if self.in_place:
            F.leaky_relu_(whole, 0.3)
        return whole * 0.5 + alias.repeat_interleave(WIDTH // alias.shape[-1], -1) * 0.5


class Stash(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        spu.skips.stash(self.name, h)
        return torch.tanh(h)


class Pop(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x + spu.skips.pop(self.name) * 0.5


class Experts(nn.Module):
    """A mixture of experts that gathers its rows: shapes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        share, chosen = self.router(rows.detach().float().to(self.router.weight.dtype)).float().softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            own = (chosen == index).nonzero().squeeze(-1)
            if len(own):
                out = out.index_add(0, own, (expert(rows[own]) * share[own, None].to(rows.dtype)).to(out.dtype))
        return x + out.reshape(x.shape)


class InnerGradient(nn.Module):
    """Uses the gradient of an energy, without a graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (force,) = torch.autograd.grad((leaf.float() ** 3).sum(), leaf)
        return self.linear(x) + torch.tanh(force) * 0.1


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(-1, -2)).transpose(-1, -2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(-3, -2) for part in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2)


class Positions(nn.Module):
    """Learned positions, taken by indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[(torch.arange(x.numel() // WIDTH) % 5).reshape(x.shape[:-1])]


def _noise(x: Tensor, gain: Tensor, kind: str) -> Tensor:
    if kind == "randn":
        return x * gain + torch.randn_like(x, dtype=torch.float32).to(x.dtype) * 0.1
    if kind == "randint":
        return x * gain + torch.randint(1, 4, x.shape).to(x.dtype) * 0.1
    if kind == "exponential":
        return x * gain + torch.empty_like(x, dtype=torch.float32).exponential_().to(x.dtype) * 0.05
    if kind == "bernoulli":
        return x * gain * torch.bernoulli(torch.full_like(x, 0.7, dtype=torch.float32)).to(x.dtype)
    if kind == "permutation":
        return x * gain + x[torch.randperm(len(x))].detach() * 0.1
    return x * gain + F.gumbel_softmax((x * gain).float(), dim=-1).to(x.dtype) * 0.2  # "gumbel"


def _sometimes(x: Tensor, gain: Tensor) -> Tensor:
    """Draws in some microbatches only."""
    return F.dropout(x * gain, 0.5) if x.detach().float().sum() > 0 else x * gain


def _looks(x: Tensor, gain: Tensor) -> Tensor:
    return x * gain if x.detach().abs().max().item() < 3.0 else torch.tanh(x * gain)


def _selects(x: Tensor, gain: Tensor) -> Tensor:
    positive = x > 0
    out = torch.zeros_like(x)
    out[positive] = (x * gain)[positive]
    return out


def _linear_pair() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=False))


def _frozen() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def _spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def _hooked() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    module.register_forward_hook(lambda module, given, out: out * 0.5)
    return module


_SIMPLE: dict[str, Callable[[random.Random], nn.Module]] = {
    "linear": lambda r: nn.Linear(WIDTH, WIDTH, bias=r.random() < 0.7),
    "mlp": lambda r: _linear_pair(),
    "layer norm": lambda r: nn.LayerNorm(WIDTH),
    "rms norm": lambda r: nn.RMSNorm(WIDTH, eps=1e-6),
    "dropout": lambda r: nn.Dropout(0.3),
    "inplace relu": lambda r: nn.LeakyReLU(0.3, inplace=True),
    "tanh": lambda r: nn.Tanh(),
    "identity": lambda r: nn.Identity(),
    "view": lambda r: Call(lambda x, gain: (x * gain).view(x.shape)),
    "frozen": lambda r: _frozen(),
    "spectral norm": lambda r: _spectral(),
    "weight norm": lambda r: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "hooked": lambda r: _hooked(),
    "checkpointed": lambda r: Checkpointed(),
    "running mean": lambda r: RunningMean(),
    "complex buffer": lambda r: Rotary(),
    "constants": lambda r: Constants(),
    "masked": lambda r: Masked(r.choice([-torch.inf, -1e9])),
    "experts": lambda r: Experts(),
    "inner gradient": lambda r: InnerGradient(),
    "positions": lambda r: Positions(),
    "looks at values": lambda r: Call(_looks),
    "selects by values": lambda r: Call(_selects),
    "draws sometimes": lambda r: Call(_sometimes),
    "detached branch": lambda r: Call(lambda x, gain: x * gain + x.detach() * 0.1),
}
_FLAT = {"batch norm": lambda r: nn.BatchNorm1d(WIDTH)}
_LONG = {"convolution": lambda r: Sequence(), "attention": lambda r: Attention()}
JUMPS = {"batch norm", "experts", "looks at values", "selects by values", "draws sometimes"}
_NOISES = ["randn", "randint", "exponential", "bernoulli", "permutation", "gumbel"]


def _draw_one(r: random.Random, long: bool, smooth: bool, depth: int) -> tuple[list[str], list[nn.Module]]:
    kind = r.random()
    if kind < 0.06:
        part, in_place = r.random() < 0.5, r.random() < 0.5
        name = f"alias{' part' * part}{' in place' * in_place}"
        return [name, "..."], [HandsAlias(part), TakesAlias(in_place)]
    if kind < 0.10:
        return ["hands mask", "..."], [HandsMask(), TakesMask()]
    if kind < 0.16 and depth == 0:
        inner_names, inner = draw_layers(r, r.randint(1, 2), long, smooth=smooth, depth=1)
        name = f"skip {r.randrange(10**6)}"
        return ["stash", *inner_names, "pop"], [Stash(name), *inner, Pop(name)]
    if kind < 0.24:
        noise = r.choice(_NOISES)
        return [noise], [Call(lambda x, gain, noise=noise: _noise(x, gain, noise))]
    menu = {**_SIMPLE, **(_LONG if long else _FLAT)}
    name = r.choice([name for name in sorted(menu) if not (smooth and name in JUMPS)])
    return [name], [menu[name](r)]


def draw_layers(
    r: random.Random, count: int, long: bool, *, smooth: bool = False, depth: int = 0
) -> tuple[list[str], list[nn.Module]]:
    """(names, layers) of ``count`` entries of the menu.

    Args:
        long: the rows are sequences.
        smooth: only layers whose result changes little when their input does.
    """
    names: list[str] = []
    layers: list[nn.Module] = []
    for _ in range(count):
        own_names, own = _draw_one(r, long, smooth, depth)
        names += own_names
        layers += own
    return names, layers


def as_plain(model: nn.Module) -> None:
    """The same functions, written so that plain torch runs each once: without the user's own checkpointing, which a
    forward in the plain run's random draws has no use for, and without changes in place that autograd refuses there
    while the copies between stages allow them."""
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = False
        elif isinstance(module, nn.LeakyReLU):
            module.inplace = False
