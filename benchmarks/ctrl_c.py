"""Bursts of Ctrl-C at random moments of a trainer's calls: `python benchmarks/ctrl_c.py [bursts] [seed]`.

Another process presses; this one steps, evaluates, saves and loads. A call must end, whole or interrupted, and the next
one must work. A call that hangs ends the process after 30 seconds, with a traceback of every thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from types import CodeType, FrameType

import torch
from torch import nn

from spu import ModelParallelTrainer

PRESSER = """
import os, random, signal, sys, time
parent, draw = int(sys.argv[1]), random.Random(int(sys.argv[2]))
for line in sys.stdin:
    time.sleep(draw.random() * float(line))
    for _ in range(draw.randint(2, 6)):
        os.kill(parent, signal.SIGINT)
        time.sleep(draw.choice([0, 0, 1e-5, 1e-4, 3e-4]))
    print("done", flush=True)
"""
CALLS = ("step", "step", "step", "evaluate", "save", "load", "prepare")


class Within:
    """A handler of SIGINT that raises inside the trainer's calls only, where it is their business."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = {getattr(ModelParallelTrainer, name).__code__ for name in {*CALLS, "close"}}
        self.raised = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in self.codes:
                self.raised += 1
                raise KeyboardInterrupt
            frame = frame.f_back


def make_trainer(seed: int) -> ModelParallelTrainer:
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 16) for _ in range(4)]
    return ModelParallelTrainer(layers, ["cpu:0", "cpu:1"], precision="fp32", microbatches=4, lr=1e-3)


def press(count: int, seed: int = 0) -> int:
    """Press `count` times; returns how many interrupts were raised."""
    x, y = torch.randn(8, 16), torch.randint(16, (8,))
    draw, handler = random.Random(seed), Within()
    before = signal.signal(signal.SIGINT, handler)
    command = [sys.executable, "-c", PRESSER, str(os.getpid()), str(seed)]
    presser = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert presser.stdin is not None
    assert presser.stdout is not None
    with tempfile.TemporaryDirectory() as folder, presser:
        trainer = make_trainer(seed)
        trainer.step(x, y)
        trainer.save(folder + "/checkpoint")
        for index in range(count):
            faulthandler.dump_traceback_later(30, exit=True)
            name = draw.choice(CALLS)
            if name == "prepare":
                trainer.close()
                trainer = make_trainer(seed)
            elif trainer.plan is None:
                trainer.step(x, y)
            arguments = {"save": (folder + "/checkpoint",), "load": (folder + "/checkpoint",)}.get(name, (x, y))
            call = getattr(trainer, name)
            begin = time.perf_counter()
            presser.stdin.write(f"{draw.choice([0.001, 0.003, 0.01])}\n")
            presser.stdin.flush()
            while time.perf_counter() - begin < 0.02:
                with contextlib.suppress(KeyboardInterrupt):
                    call(*arguments)
            assert "done" in presser.stdout.readline()
            loss = trainer.step(x, y).loss  # the burst is over: this must work
            assert loss < 4, f"burst {index}, {name}: loss {loss}"
            faulthandler.cancel_dump_traceback_later()
        trainer.close()
        presser.stdin.close()
    signal.signal(signal.SIGINT, before)
    return handler.raised


if __name__ == "__main__":
    begin = time.perf_counter()
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    raised = press(number, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{number} bursts, {raised} interrupts raised, {time.perf_counter() - begin:.0f} s, no hang")
