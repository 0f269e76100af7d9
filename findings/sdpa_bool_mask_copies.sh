#!/usr/bin/env bash
# torch 2.13.0, CPU: a boolean mask that every layer shares is kept for the backward once for each layer, as numbers; the
# same mask given as numbers is kept once for all.
#
# scaled_dot_product_attention turns a boolean mask into one of 0 and -inf in the queries' dtype, in each call anew, and
# autograd keeps what was made. One would guess the cheaper dtype to be the cheaper mask: it is a byte a value against
# four, and nobody else copies it. With 32 layers and 4,096 tokens in fp32 the boolean mask (17 MB) becomes 2.1 GB; the
# one of numbers stays at 67 MB. transformers gives boolean masks to this function.
#
# Seen (4 calls, 1,024 x 1,024; bytes of mask that the graph keeps, and in how many tensors):
#   float32: boolean mask 16,777,216 in 4; of numbers 4,194,304 in 1. bfloat16: 8,388,608 in 4; 2,097,152 in 1.
#   Results and gradients of both are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
tokens, calls = 1024, 4
boolean = torch.ones(tokens, tokens, dtype=torch.bool).tril()
for dtype in (torch.float32, torch.bfloat16):
    numbers = torch.zeros(tokens, tokens, dtype=dtype).masked_fill_(~boolean, -torch.inf)
    x = torch.randn(1, 2, tokens, 16, dtype=dtype)
    found, kept = [], []
    for mask in (boolean, numbers):
        q, storages = x.clone().requires_grad_(), {}

        def keep(tensor):
            if tensor.shape[-2:] == (tokens, tokens):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = sum(F.scaled_dot_product_attention(q, q, q, mask) for _ in range(calls))
        y.float().square().sum().backward()
        found.append((y.detach(), q.grad))
        kept.append((len(storages), sum(storages.values())))
    equal = all(torch.equal(a, b) for a, b in zip(*found))
    print(f"{str(dtype)[6:]:9} boolean mask: {kept[0]}, of numbers: {kept[1]} (tensors, bytes); equal {equal}")
    size = tokens * tokens * dtype.itemsize
    assert kept == [(calls, calls * size), (1, size)] and equal, (dtype, kept, equal)
PY
