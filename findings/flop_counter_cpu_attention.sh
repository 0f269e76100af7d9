#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts no attention on a CPU, but with dropout; nor a layer in evaluation, nor an LSTM.
#
# torch.utils.flop_counter counts what operators it knows do, and one sizes a model with it before one has the GPU. It knows the
# fused attention kernels of CUDA. On a CPU scaled_dot_product_attention runs one whose name it does not know, forward and
# backward: 0. With dropout, or under SDPBackend.MATH, the same call is made of two products, and counted. So the total of a
# transformer has its attention in training with dropout and lacks it without; a long context looks as cheap as a short one. The
# fast path of TransformerEncoderLayer is one unknown operator, so that in evaluation the whole layer counts 0, linears too. An
# LSTM is 0 (its GRU is not), and so are mv, addbmm and grouped_mm. There is no list of what was left out.
#
# Seen, 2 x 4 heads x 32 tokens x 16, 524,288 expected: attention 0, backward 0, causal 0, dropout 524,288, MATH 524,288;
# TransformerEncoderLayer of 21 tokens trained 86,016 without its attention, evaluated under no_grad 0; LSTM 0, GRU 30,720; 16 x
# 16 matrix times a vector 0, times a matrix 8,192; addbmm 0, baddbmm 144; grouped_mm 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(function, *args, **options):
    with FlopCounterMode(display=False) as counter:
        function(*args, **options)
    return counter.get_total_flops()


q = torch.randn(2, 4, 32, 16, requires_grad=True)
attention = F.scaled_dot_product_attention
products = 2 * 2 * (2 * 4) * 32 * 32 * 16
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
x = torch.randn(3, 7, 16)
linears = 2 * 3 * 7 * (4 * 16 * 16 + 2 * 16 * 32)
square, rows = torch.randn(16, 16), torch.randn(5, 2, 16)
experts = torch.randn(2, 16, 16, dtype=torch.bfloat16)
ends = torch.tensor([4, 8], dtype=torch.int32)


def math():
    with sdpa_kernel(SDPBackend.MATH):
        attention(q, q, q)


def evaluated():
    with torch.no_grad():
        layer.eval()(x)


counts = {
    "attention": (flops(attention, q, q, q), 0),
    "attention, forward and backward": (flops(lambda: attention(q, q, q).sum().backward()), 0),
    "attention, causal": (flops(attention, q, q, q, is_causal=True), 0),
    "attention with dropout": (flops(attention, q, q, q, dropout_p=0.1), products),
    "attention, MATH": (flops(math), products),
    "encoder layer, trained": (flops(layer.train(), x), linears),
    "encoder layer, evaluated": (flops(evaluated), 0),
    "LSTM": (flops(nn.LSTM(16, 16), rows), 0),
    "GRU": (flops(nn.GRU(16, 16), rows), 2 * 5 * 2 * 16 * 48 * 2),
    "matrix times vector": (flops(torch.mv, square, square[0]), 0),
    "matrix times matrix": (flops(torch.mm, square, square), 2 * 16**3),
    "addbmm": (flops(torch.addbmm, torch.zeros(3, 3), torch.ones(2, 3, 4), torch.ones(2, 4, 3)), 0),
    "baddbmm": (flops(torch.baddbmm, torch.zeros(2, 3, 3), torch.ones(2, 3, 4), torch.ones(2, 4, 3)), 144),
    "grouped_mm": (flops(F.grouped_mm, experts.flatten(0, 1)[:8], experts, offs=ends), 0),
}
for name, (count, expected) in counts.items():
    print(f"{name}: {count:,}")
    assert count == expected, (name, expected)
PY
