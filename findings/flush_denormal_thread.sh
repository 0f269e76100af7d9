#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.set_flush_denormal(True) holds for the calling thread's share of a tensor, and not for the rest.
#
# The documentation says that it "disables denormal floating numbers on CPU". It sets a register of the core for the thread
# that calls. A product of a large tensor is shared among threads, which keep theirs: with two threads the first half of the
# result is flushed and the second is not. A small tensor is flushed whole, one thread flushes all, a thread of one's own that is
# older flushes nothing. So equal elements of one tensor get different results by their place, and by how many threads there are.
#
# Seen, 4,194,304 denormal numbers times 1, two threads: half are 0, the first one among them and not the last; 1,024 numbers:
# all 0; AdamW's second moments of equal gradients: half are 0; in an older thread none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import threading

import torch

torch.set_num_threads(2)
large, small = torch.full((1 << 22,), 1e-39), torch.full((1 << 10,), 1e-39)  # denormal in fp32
weight = torch.nn.Parameter(torch.zeros(1 << 22))
weight.grad = torch.full((1 << 22,), 1e-18)  # its square times 0.001 is denormal
go, seen = threading.Event(), []


def flushed(x):
    return ((x * 1.0).view(torch.int32) == 0).double().mean().item()


older = threading.Thread(target=lambda: (go.wait(), seen.append(flushed(small))))
older.start()
if not torch.set_flush_denormal(True):
    raise SystemExit("this processor has no such switch")
product = large * 1.0
found = flushed(large), flushed(small), product[0].item(), product.view(torch.int32)[-1].item()
optimizer = torch.optim.AdamW([weight], foreach=False)
optimizer.step()
moment = optimizer.state[weight]["exp_avg_sq"]
zeros = (moment.view(torch.int32) == 0).double().mean().item()
go.set()
older.join()
print("share flushed: large", found[0], "small", found[1], "second moments", zeros, "in an older thread", seen[0])
assert 0.2 < found[0] < 0.8 and found[1] == 1.0 and found[2] == 0.0 and found[3] != 0
assert 0.2 < zeros < 0.8 and seen == [0.0]
PY
