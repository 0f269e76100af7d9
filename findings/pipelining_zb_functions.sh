#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: under zero-bubble schedules a custom autograd.Function computes both gradients
# twice, so a split backward of such layers takes twice the products of 1F1B.
#
# The schedule takes the gradient of a stage's input first and those of its weights later, by two calls of
# torch.autograd.grad. Layers of torch's own compute what each call asks for: one product then, one later. A Python
# Function is asked for all its inputs both times: ctx.needs_input_grad says what requires a gradient, not what is asked
# for, so a linear layer as a Function (as fused kernels are brought to autograd) makes four products where 1F1B makes
# two. Gradients are right.
#
# Seen, the middle stage of three, 4 microbatches, products of its backwards under 1F1B and zero bubble: torch's linear
# layer 8 and 8, the same as a Function 8 and 16, each time with needs_input_grad == (True, True)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.utils._python_dispatch import TorchDispatchMode

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
WIDTH = 48  # of the middle stage: its products are known by it
asked, middle = [], []


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        if weight.shape == (WIDTH, WIDTH):
            asked.append(ctx.needs_input_grad)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, dy.t() @ x if ctx.needs_input_grad[1] else None


class ByFunction(nn.Linear):
    def forward(self, x):
        return Multiply.apply(x, self.weight)


class Products(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            shapes = {tuple(a.shape) for a in args}
            middle.append((WIDTH, WIDTH) in shapes or tuple(args[0].shape)[0] == WIDTH == tuple(args[1].shape)[1])
        return func(*args, **(kwargs or {}))


def run(kind, layer):
    """Return how many products the middle stage's backwards make, its gradient, and what a Function was asked for."""
    torch.manual_seed(0)
    parts = [nn.Linear(8, WIDTH, bias=False), layer(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 8, bias=False)]
    stages = [PipelineStage(part, k, 3, torch.device("cpu")) for k, part in enumerate(parts)]
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    schedule = kind(stages, 4, loss_fn=nn.functional.mse_loss)
    schedule.step(x, target=y, return_outputs=False)  # asks for shapes, once
    parts[1].weight.grad = None
    middle.clear()
    asked.clear()
    with Products():
        schedule.step(x, target=y, return_outputs=False)
    return sum(middle) - 4, parts[1].weight.grad, list(asked)


for layer in (nn.Linear, ByFunction):
    one, want, _ = run(ScheduleInterleaved1F1B, layer)
    split, grad, calls = run(ScheduleInterleavedZeroBubble, layer)
    print(layer.__name__, "products under 1F1B:", one, "zero bubble:", split, "calls:", len(calls), set(calls))
    torch.testing.assert_close(grad, want)
    assert one == 8 and split == (8 if layer is nn.Linear else 16)
    assert set(calls) <= {(True, True)}
PY
