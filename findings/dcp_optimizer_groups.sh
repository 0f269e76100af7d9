#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.state_dict: loading into other parameter groups takes one group's options for all.
#
# set_optimizer_state_dict matches parameters by name, so that a checkpoint may be loaded where parameters are sharded or
# grouped otherwise. The moments go to their parameters. But a group that now holds parameters of several saved groups takes
# learning rate, weight decay and betas from the last of them: of "matrices with decay" and "biases without", loaded into
# one group, everything goes on with the biases' rate and without decay, whatever the optimizer was made with. The other way
# round, a saved group gives its options to one of the present groups that share it, and the others are left without a
# learning rate. The plain optimizer.load_state_dict raises where the groups differ in number or size.
#
# Seen, saved: weights lr 0.1, decay 0.5, bias lr 0.001, decay 0; loaded into one group made with lr 0.1, decay 0.5: lr 0.001,
# decay 0.0; into [one weight], [the other, bias]: none, none; lr 0.001, decay 0.0; load_state_dict: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
        self.bias = nn.Parameter(torch.ones(2))


def optimizer(*groups, lr=0.1, weight_decay=0.5):
    return torch.optim.AdamW([{"params": params} for params in groups], lr=lr, weight_decay=weight_decay)


saved = Net()
before = optimizer([saved.one, saved.two], [saved.bias])
before.param_groups[1].update(lr=0.001, weight_decay=0.0)
sum(p.square().sum() for p in saved.parameters()).backward()
before.step()
state = get_optimizer_state_dict(saved, before)

seen = []
for split in ("one group", "other groups"):
    net = Net()
    groups = [[net.one, net.two, net.bias]] if split == "one group" else [[net.one], [net.two, net.bias]]
    after = optimizer(*groups)
    set_optimizer_state_dict(net, after, copy.deepcopy(state))
    assert torch.equal(after.state[net.two]["exp_avg"], before.state[saved.two]["exp_avg"])
    seen.append([(group.get("lr"), group.get("weight_decay")) for group in after.param_groups])
    print(f"{split}: (lr, decay)", seen[-1])
try:
    optimizer(list(Net().parameters())).load_state_dict(before.state_dict())
    plain = "loaded"
except ValueError as error:
    plain = f"ValueError: {error}"
print("optimizer.load_state_dict:", plain)
assert seen == [[(0.001, 0.0)], [(None, None), (0.001, 0.0)]] and plain.startswith("ValueError")
PY
