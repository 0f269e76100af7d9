#!/usr/bin/env bash
# torch 2.13.0: sum() and mean() of a jagged nested tensor made by narrow() take in what lies between the sequences.
#
# torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged) gives the sequences of a padded batch as a view of it,
# which keeps a start and a length for each and the padding between them. Whoever asks for one sequence gets that one, and
# numel() counts the sequences alone. A reduction of everything (sum, mean, amax) runs over the whole buffer and divides by
# its size, so a loss takes in the padding, and its gradient goes there too. Along one dimension such a tensor is
# refused by name ("not supported for non-contiguous nested tensors"); without one nothing is said. contiguous() helps.
#
# Seen, sequences of 2 and 3 ones in a batch padded with 100 to 2 x 4: numel 5; sum 305, mean 38.125, amax 100; after
# contiguous() 5, 1, 1; the sum's gradient is 1 in the padding, too
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

lengths = torch.tensor([2, 3])
padded = torch.full((2, 4), 100.0)
for row, length in enumerate(lengths):
    padded[row, :length] = 1.0
padded.requires_grad_()
rows = torch.nested.narrow(padded.unsqueeze(-1), 1, torch.tensor([0, 0]), lengths, layout=torch.jagged)
assert [row.flatten().tolist() for row in rows.unbind()] == [[1.0] * 2, [1.0] * 3]
found = rows.numel(), rows.sum().item(), rows.mean().item(), rows.amax().item()
whole = rows.contiguous()
after = whole.numel(), whole.sum().item(), whole.mean().item(), whole.amax().item()
(gradient,) = torch.autograd.grad(rows.sum(), padded)
print("numel, sum, mean, amax:", found, "after contiguous():", after, "the sum's gradient:", gradient.tolist())
assert found == (5, 305.0, 38.125, 100.0) and after == (5, 5.0, 1.0, 1.0)
assert gradient.tolist() == [[1.0] * 4] * 2
PY
