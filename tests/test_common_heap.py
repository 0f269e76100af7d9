"""The C library's heap: what is freed goes back to the system."""

from __future__ import annotations

import sys

import pytest
from hard_limit import run_limited

from spu.common.product_cache import VARIABLES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")

HELD = """
import torch
from spu.common import heap

def held():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
"""


def numbers(source: str, **environment: str) -> list[int]:
    run = run_limited(HELD + source, environment=environment)
    assert run.code == 0, run.errors
    return [int(line) for line in run.output.split()]


def test_give_back_returns_what_lies_between_tensors_that_are_alive() -> None:
    before, full, holes, after = numbers(
        "torch.ones(1)\n"
        "heap.give_back()\n"  # what the imports have freed would be used first
        "print(held())\n"
        "made = [torch.ones(1 << 14) for _ in range(1024)]\n"  # 64 KB each
        "print(held())\n"
        "made = made[::8]\n"
        "print(held())\n"
        "heap.give_back()\n"
        "print(held())\n"
    )
    assert full - before > 60 << 20
    assert holes - before > 50 << 20  # otherwise glibc gives it back by itself
    assert after - before < 12 << 20


@pytest.mark.parametrize("shared", [False, True])
def test_share_heaps_lets_threads_use_what_others_have_freed(shared: bool) -> None:
    (grown,) = numbers(
        "import threading\n"
        f"heap.share_heaps() if {shared} else None\n"
        "torch.ones(1)\n"
        "before, kept, turn, begun = held(), [], threading.Lock(), threading.Barrier(4)\n"
        "def work():\n"
        "    begun.wait()\n"
        "    with turn:\n"
        "        made = [torch.ones(1 << 14) for _ in range(512)]\n"  # 32 MB
        "        kept.append(made.pop())\n"
        "        del made\n"
        "    begun.wait()\n"  # the heap of a thread that has ended is another's
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(held() - before)\n",
        MALLOC_ARENA_MAX="8",
    )
    assert grown < 60 << 20 if shared else grown > 90 << 20


def test_a_training_whose_rows_have_other_lengths_each_step_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:  # of a trainer of another test
        monkeypatch.delenv(name, raising=False)
    early, late = numbers(
        "import random, spu\n"
        "from torch import nn\n"
        "torch.manual_seed(0)\n"
        "random.seed(0)\n"
        "class Experts(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weights = nn.Parameter(torch.randn(2, 64, 64) / 8)\n"
        "    def forward(self, x):\n"
        "        cut = random.randint(1, x.shape[1] - 1)\n"
        "        return torch.cat([x[:, :cut] @ self.weights[0], x[:, cut:] @ self.weights[1]], 1)\n"
        "model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), Experts())\n"
        "device = spu.DeviceManager('cpu:0=64MB').get_devices('cpu:0')\n"
        "trainer = spu.ModelParallelTrainer(model, device, precision='fp16', microbatches=2)\n"
        "for step in range(120):\n"
        "    ids = torch.randint(64, (8, random.Random(step).randint(16, 256)))\n"
        "    trainer.step(ids, ids)\n"
        "    print(held()) if step in (39, 119) else None\n"
    )
    assert late - early < 12 << 20  # 136 MB with torch's own caches
