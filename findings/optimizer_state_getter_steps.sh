#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.state_dict: get_optimizer_state_dict changes the training that follows.
#
# It is a getter. Of an optimizer that has made no step yet it makes the state that it is to return, by a step with lr 0 and
# gradients of 0: parameters stay, but each counts one step. So the first real step of AdamW is corrected for a bias of two
# steps, and a training that looks at its state first (to plan memory, to load a checkpoint into it, to save step 0) ends
# with other weights. NAdam, RAdam, Adamax, Adafactor, Rprop and ASGD differ too; SGD, RMSprop and Adagrad do not.
#
# Seen: AdamW steps 3.0 4.0 equal False | Rprop steps 3.0 4.0 equal False | Adagrad steps 3.0 3.0 equal True | first update of
# AdamW 0.1 0.0744
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/getter.py" <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def train(kind, look, steps, **options):
    """Returns the weight's change, and the steps that its state has counted."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    start = model.weight.detach().clone()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    if look:
        get_optimizer_state_dict(model, optimizer)
        assert torch.equal(model.weight, start)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    counted = optimizer.state[model.weight].get("step", torch.tensor(float("nan")))
    return model.weight.detach() - start, counted.item()


for kind, counts, same in (
    (torch.optim.AdamW, True, False),
    (torch.optim.Rprop, True, False),
    (torch.optim.Adagrad, False, True),
):
    (plain, steps), (looked, more) = train(kind, False, 3), train(kind, True, 3)
    print(kind.__name__, "steps", steps, more, "equal", torch.equal(plain, looked))
    assert (steps, more) == (3, 4 if counts else 3)
    assert torch.equal(plain, looked) is same
assert torch.equal(train(torch.optim.SGD, False, 3, momentum=0.9)[0], train(torch.optim.SGD, True, 3, momentum=0.9)[0])
first, second = (train(torch.optim.AdamW, look, 1, weight_decay=0.0)[0].abs().mean().item() for look in (False, True))
print("first update of AdamW", round(first, 4), round(second, 4))
assert abs(first - 0.1) < 1e-3 and abs(second - 0.0744) < 1e-3
PY
"$folder/venv/bin/python" -W ignore "$folder/getter.py"
