#!/usr/bin/env bash
# torch 2.13.0: softmax along the ragged dimension of a jagged nested tensor is right, and its gradient is wrong.
#
# Weights over the tokens of each sequence, softmax(scores, dim=1) of a (batch, jagged, heads) tensor, are what attention
# pooling is made of. The forward takes care of the sequences: each one's weights add up to 1. The backward runs the ordinary
# softmax's on the packed values, where that dimension number means another axis: heads are mixed, and tokens are not. The
# gradient of the weights' own sum, which is constant, is not 0. Nothing is raised, the loss is right, and training goes on in a
# wrong direction. exp(), and division by the sum of each sequence, written out, are right.
#
# Seen, sequences of 3, 7 and 5 tokens with two heads, error of the gradient relative to that of one sequence at a time: softmax
# 0.4 to 0.5, forward 0; the gradient of the weights' sum up to 0.22, one at a time 2e-16; written out right to 1e-16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch

torch.manual_seed(0)
scores = [torch.randn(tokens, 2, dtype=torch.float64) for tokens in (3, 7, 5)]
arriving = [torch.randn_like(s) for s in scores]
single = [s.clone().requires_grad_() for s in scores]
weights = [s.softmax(0) for s in single]
sum((w * g).sum() for w, g in zip(weights, arriving)).backward()

jagged = torch.nested.nested_tensor(scores, layout=torch.jagged, requires_grad=True)
found = jagged.softmax(1)
forward = max((a - b).abs().max().item() for a, b in zip(found.unbind(), weights))
sum((w * g).sum() for w, g in zip(found.unbind(), arriving)).backward()
errors = [((a - b.grad).norm() / b.grad.norm()).item() for a, b in zip(jagged.grad.unbind(), single)]
print(f"forward's error {forward:.1g}, gradients' relative errors", [f"{e:.2g}" for e in errors])
assert forward < 1e-12 and min(errors) > 0.1

jagged.grad = None
jagged.softmax(1).sum().backward()
largest = max(g.abs().max().item() for g in jagged.grad.unbind())
plain = [s.clone().requires_grad_() for s in scores]
sum(s.softmax(0).sum() for s in plain).backward()
right = max(s.grad.abs().max().item() for s in plain)
print(f"gradient of the weights' sum: {largest:.2g}, one sequence at a time {right:.1g}")
assert largest > 0.05 and right < 1e-14

flat, ends = torch.cat(scores).requires_grad_(), [0, 3, 10, 15]
written = torch.nested.nested_tensor_from_jagged(flat.exp(), torch.tensor(ends))
found = written / torch.stack([part.sum(0, keepdim=True) for part in written.unbind()])
sum((w * g).sum() for w, g in zip(found.unbind(), arriving)).backward()
error = max((flat.grad[a:b] - s.grad).abs().max().item() for a, b, s in zip(ends, ends[1:], single))
print(f"written out: gradient's error {error:.1g}")
assert error < 1e-12
PY
