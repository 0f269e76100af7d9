#!/usr/bin/env bash
# torch 2.13.0: under checkpoint(use_reentrant=False) a saved tensor that is changed in place gives a wrong gradient.
#
# tanh saves its result for the backward, and mul_ changes it. Plain autograd compares the tensor's version with the one
# that it saved, and raises. It does so only for tensors without hooks; the checkpoint hands its saved tensors back by
# hooks, and does not look either. So a layer that never ran gets gradients once it is checkpointed: wrong ones, without
# a word, with determinism_check and with set_checkpoint_debug_enabled too. use_reentrant=True raises. save_on_cpu is the
# same case for tensors that are on the CPU already.
#
# Seen, tanh().mul_(2) and a linear layer: plain RuntimeError; use_reentrant=True RuntimeError; use_reentrant=False an
# error of 1.9 times the gradient, with the debug mode too; save_on_cpu 1.9
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_debug_enabled

torch.manual_seed(0)
linear = torch.nn.Linear(4, 4)
x = torch.randn(3, 4, requires_grad=True)


def block(x, in_place=True):
    h = x.tanh()
    return linear(h.mul_(2) if in_place else h * 2)


def backward(run):
    x.grad = None
    run().sum().backward()
    return x.grad


def right():
    return block(x, in_place=False)


def debugged():
    with set_checkpoint_debug_enabled(True):
        return checkpoint(block, x, use_reentrant=False)


def on_cpu():
    with torch.autograd.graph.save_on_cpu():
        return block(x)


cases = {
    "plain": (lambda: block(x), True),
    "use_reentrant=True": (lambda: checkpoint(block, x, use_reentrant=True), True),
    "use_reentrant=False": (lambda: checkpoint(block, x, use_reentrant=False), False),
    "the same, debug": (debugged, False),
    "save_on_cpu": (on_cpu, False),
}
truth = backward(right).clone()
for name, (run, raises) in cases.items():
    try:
        error = ((backward(run) - truth).norm() / truth.norm()).item()
    except RuntimeError as refused:
        print(f"{name:20} RuntimeError: {str(refused)[:80]}")
        assert raises, name
    else:
        print(f"{name:20} error {error:.1f}")
        assert not raises and error > 1, name
PY
