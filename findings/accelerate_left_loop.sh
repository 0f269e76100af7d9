#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: after a validation loop that was left by break, training drops an epoch's last gradients.
#
# Inside accumulate() the last batch of an epoch makes a step, also where the window is not full. Whether it is the last is
# asked of the innermost data loader that is being read. A prepared loader takes that place when its loop begins and gives
# it back only when the loop runs out: after `break` (or a return) it keeps it, although its iterator is gone. The training
# loader is not asked any more, so its last batches make no step; their gradients stay, since zero_grad() is left out
# too, and are added to the next epoch's first window.
#
# Seen, 10 batches, a step every 4, one validation after the fifth: read to its end, steps after batches 4, 8 and 10; left by
# break, after 4 and 8, and a gradient is left at the epoch's end
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy accelerate==1.15.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
rows = torch.arange(10.0).view(10, 1)


def epoch(left):
    model = torch.nn.Linear(1, 1)
    made = model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows), DataLoader(rows)
    model, optimizer, training, validation = accelerator.prepare(*made)
    steps = []
    for count, x in enumerate(training, 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            steps.append(count)
        if count == 5:
            for place, x in enumerate(validation):
                if left and place == 2:
                    break
    return steps, model.weight.grad is not None


for left, expected in ((False, ([4, 8, 10], False)), (True, ([4, 8], True))):
    found = epoch(left)
    print("left by break:" if left else "read to its end:", "steps after", found[0], "a gradient is left:", found[1])
    assert found == expected
PY
