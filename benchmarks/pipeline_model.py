"""The decoder LM of the pipeline benchmarks, in plain torch ops, and one core's training loop on it.

Pre-norm, Llama-style: width 512, 8 heads, SwiGLU 1408, 8 layers, a vocabulary of 256 bytes, no biases. A step is 16
sequences of 256 tokens in 8 microbatches. Its linear layers call ``F.linear`` themselves, so nothing replaces them.
Without bf16 instructions torch takes a minute for a bf16 step on one core: there its sequences have 16 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, LAYERS, VOCAB = 512, 8, 1408, 8, 256
ROWS, MICROBATCHES = 16, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Project(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.qkv, self.out = Project(WIDTH, 3 * WIDTH), Project(WIDTH, WIDTH)
        self.gate, self.up, self.down = Project(WIDTH, HIDDEN), Project(WIDTH, HIDDEN), Project(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape  # x: [rows, length, WIDTH]
        qkv = self.qkv(F.rms_norm(x, (WIDTH,), self.norm1)).view(rows, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [rows, HEADS, length, WIDTH / HEADS]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        h = F.rms_norm(x, (WIDTH,), self.norm2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.project = Project(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.rms_norm(x, (WIDTH,), self.norm))


def make_layers() -> list[nn.Module]:
    """Ten layers: embedding, blocks, head."""
    torch.manual_seed(0)
    return [nn.Embedding(VOCAB, WIDTH), *(Block() for _ in range(LAYERS)), Head()]


def sequence_length(dtype: torch.dtype) -> int:
    """256, or 16 where torch has no instructions for the dtype."""
    cpuinfo = Path("/proc/cpuinfo")
    fast = dtype == torch.float32 or (cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text())
    return 256 if fast else 16


def make_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB, (ROWS, sequence_length(dtype) + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


def plain_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward and backward of every microbatch, called directly; gradients are added up."""
    for part_x, part_y in zip(x.tensor_split(MICROBATCHES), y.tensor_split(MICROBATCHES), strict=True):
        (loss_fn(model(part_x), part_y) / MICROBATCHES).backward()
