#!/usr/bin/env bash
# torch 2.13.0: SGD with momentum on a sparse gradient has a momentum that grows with every step, to many times the weight.
#
# nn.Embedding(sparse=True) is taken so that a step touches the rows of a batch alone, and SGD takes such gradients, with
# momentum too. Its buffer is then a sparse tensor, and one expects a row in it at most once for each row of the table. buffer *
# momentum + gradient puts the new entries behind the old ones: what a batch has touched is there again for each batch, none is
# ever added up or dropped. After 200 steps of 100 of 1,000 rows the buffer has 19 times as many values as the whole weight,
# after 1,000 steps 94 times; each step goes through all of them, and state_dict() writes them. The steps are those of dense
# SGD. coalesce() of the buffer, now and then, has the same values in a row each.
#
# Seen, a table of 1,000 rows and 16 columns, 100 random rows a step, entries in the buffer: after 10 steps 997, after 100
# 9,725, after 200 19,282; coalesced 1,000; saved state 0.07, 0.70, 1.39 MB, where the weight itself has 0.06
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import io

import torch

ROWS = 1000


def made(sparse):
    torch.manual_seed(0)
    table = torch.nn.Embedding(ROWS, 16, sparse=sparse)
    return table, torch.optim.SGD(table.parameters(), lr=0.01, momentum=0.9)


(table, optimizer), (dense, usual) = made(True), made(False)
draw, seen = torch.Generator().manual_seed(1), {}
for step in range(1, 201):
    ids = torch.randint(ROWS, (100,), generator=draw)
    for model, own in ((table, optimizer), (dense, usual)):
        own.zero_grad()
        model(ids).square().sum().backward()
        own.step()
    if step in (10, 100, 200):
        buffer, file = optimizer.state[table.weight]["momentum_buffer"], io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        seen[step] = buffer._nnz()
        print(f"step {step}: {buffer._nnz()} entries, saved {file.tell() / 1e6:.2f} MB")
together, apart = buffer.coalesce(), (table.weight - dense.weight).abs().max().item()
print(f"coalesced {together._nnz()} entries; weight {table.weight.nbytes / 1e3:.0f} KB; from dense SGD {apart:.1g}")
assert seen[10] > 900 and seen[100] > 9 * ROWS and seen[200] > 18 * ROWS
assert together._nnz() <= ROWS and apart < 1e-4
PY
