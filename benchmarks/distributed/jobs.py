"""What the distributed benchmarks train: a small decoder in plain torch, its batches, and the same on spu's kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["JOBS", "Job", "batch", "cut", "layers", "loss_fn", "sizes"]


@dataclass(frozen=True)
class Job:
    """Sizes; the defaults are those of `spu train`'s own job: 3M parameters, 1,024 tokens a step."""

    width: int = 192
    blocks: int = 6
    rows: int = 8
    length: int = 128
    microbatches: int = 8
    vocabulary: int = 2048
    precision: str = "fp32"

    @property
    def heads(self) -> int:
        return max(1, self.width // 48)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.blocks} blocks, {self.rows} x {self.length} tokens in {self.microbatches} "
            f"microbatches, {self.precision}"
        )


JOBS: dict[str, dict[str, Any]] = {
    "main": {},
    "thin": {"width": 128, "blocks": 2, "rows": 16, "length": 256, "vocabulary": 256},
    "wire": {"width": 64, "blocks": 2, "rows": 32, "length": 128, "vocabulary": 64, "microbatches": 4},
    "bulk": {"width": 64, "blocks": 2, "rows": 128, "length": 128, "vocabulary": 64, "microbatches": 4},
}
"""By name; all but "main" have little work for each byte that crosses, as cards have that are faster than a core. The
fixed cost of a message of "wire" is two fifths of what int8 saves at 1 Gbit/s; messages of "bulk" are four times as
large.
"""


def sizes(text: str) -> dict[str, Any]:
    """Return the sizes of a named job, or those that a text gives as JSON."""
    return JOBS[text] if text in JOBS else json.loads(text)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, as in Llama, without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 64 * math.ceil(width * 8 / 3 / 64)
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [rows, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def layers(job: Job) -> list[nn.Module]:
    """Return embedding, blocks, norm and head: the same values on every call."""
    torch.manual_seed(0)
    blocks = [Block(job.width, job.heads) for _ in range(job.blocks)]
    head = nn.Sequential(nn.RMSNorm(job.width, eps=1e-5), nn.Linear(job.width, job.vocabulary, bias=False))
    return [nn.Embedding(job.vocabulary, job.width), *blocks, head]


def batch(job: Job, step: int) -> tuple[Tensor, Tensor]:
    """Return token numbers of a step and what is to be learnt from them, [rows, length] each."""
    draws = torch.Generator().manual_seed(step)
    tokens = torch.randint(job.vocabulary, (job.rows, job.length), generator=draws)
    return tokens, tokens * 3 % job.vocabulary


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, fp32."""
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


def cut(parts: Sequence[nn.Module], end: int, rank: int) -> nn.Sequential:
    """Return one of two stages: the layers before ``end``, or those from there on."""
    return nn.Sequential(*(parts[:end] if rank == 0 else parts[end:]))
