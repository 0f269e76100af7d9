"""What rounding the activations that wait does to a training: `python benchmarks/packed_loss.py [steps] [seed ...]`.

A model of characters, 0.4 million parameters in residual blocks: 16 bytes of ``pydoc_data.topics`` in, the next one
out. Its layers are streamed from a disk, and what lies between them waits there exactly, in int8 or in int4. Prints
the loss on the text's last tenth, which was not trained on, for every seed, and the difference to exact.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import warnings
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

from spu import DeviceManager, ModelParallelTrainer

CONTEXT, WIDTH, BLOCKS, ROWS = 16, 128, 4, 256
MODES = ("exact", "int8", "int4")


class Block(nn.Module):
    """A residual block of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next state, of x's shape."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Entry(nn.Module):
    """Bytes [rows, 16] -> states [rows, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(256, 24), nn.Linear(CONTEXT * 24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first state."""
        return self.mix(self.table(x).flatten(1))


def windows(text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (bytes [rows, 16], the next bytes [rows])."""
    return text[starts[:, None] + torch.arange(CONTEXT)], text[starts + CONTEXT]


def final_loss(mode: str, seed: int, steps: int, folder: str) -> float:
    """Train, and return the loss on held-out text in nats a byte."""
    text = torch.frombuffer(bytearray("".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.uint8)
    text, cut = text.long(), len(text) * 9 // 10
    torch.manual_seed(seed)
    model = nn.Sequential(Entry(), *(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 256))
    draw = torch.Generator().manual_seed(seed)
    held = windows(text, torch.arange(cut, len(text) - CONTEXT, 7)[:4096])
    device = dataclasses.replace(DeviceManager().get_devices(["cpu:0"])[0], threads=1)
    how = {"residency": "streamed", "activations": mode, "recompute": True, "tiers": f"disk={folder}:1GB"}
    how |= {"precision": "fp16", "microbatches": 2, "max_grad_norm": 1.0, "lr": 2e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a disk that is not read around the system's cache
        with ModelParallelTrainer(model, [device], lr_schedule=lambda step: 1 - 0.95 * step / steps, **how) as trainer:
            for _ in range(steps):
                trainer.step(*windows(text, torch.randint(cut - CONTEXT, (ROWS,), generator=draw)))
            plan = trainer.plan
            assert plan is not None
            assert plan.streaming is not None
            assert plan.streaming.activations == mode
            return trainer.evaluate(*held)


def main(steps: int = 300, *seeds: int) -> None:
    """Print a row a seed."""
    torch.set_num_threads(1)
    print("seed  " + "  ".join(f"{mode:>14}" for mode in MODES))
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds or (0, 1, 2):
            losses = [final_loss(mode, seed, steps, folder) for mode in MODES]
            shown = (f"{loss:.4f} {loss / losses[0] - 1:+.2%}" for loss in losses)
            print(f"{seed:4}  " + "  ".join(f"{text:>14}" for text in shown), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
