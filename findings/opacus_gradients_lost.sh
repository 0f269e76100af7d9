#!/usr/bin/env bash
# opacus 1.6.0 with torch 2.13.0: a private optimizer leaves out each gradient that does not come through its module's own call.
#
# make_private() clips and adds up gradients of single rows, which hooks on the modules compute. The engine checks the modules and
# refuses those it cannot do. A weight that is used in another way is no module of its own, and passes: the output of a
# language model as F.linear(hidden, self.embed.weight), a penalty on the weights in the loss. backward() gives its .grad in
# full. step() then puts the hooks' sum in its place, without the other part, and trains with that. A tied head that is a
# module with the same weight is right to the last digits, so a model that is only rewritten trains otherwise.
#
# Seen, no noise and no clipping, distance of the embedding's gradient from plain torch's over its norm, after backward() and in
# step(): head F.linear(hidden, embed.weight) 0.0 and 0.717; tied head as a module 0.0 and 0.0; no tie 0.0 and 0.0; no tie, a
# penalty of the weights' squares 0.0 and 1.01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Words(nn.Module):
    """A language model of a token, whose head is tied to the embedding in one of two ways, or not at all."""

    def __init__(self, head):
        super().__init__()
        self.embed, self.body = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.head = None if head == "functional" else nn.Linear(4, 10, bias=False)
        if head == "module":
            self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = torch.tanh(self.body(self.embed(ids)))
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)


def distances(head, penalty=0.0):
    """Return how far the embedding's gradient is from plain torch's after backward() and after step(), over its norm."""
    torch.manual_seed(0)
    plain = Words(head)
    model = copy.deepcopy(plain)
    ids = torch.randint(0, 10, (8,))
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=DataLoader(ids, batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=1e9,
        poisson_sampling=False,
    )

    def distance():
        return round(((model.embed.weight.grad - right).norm() / right.norm()).item(), 3)

    for called in (plain, private):
        squares = sum(weight.square().sum() for weight in called.parameters())
        (F.cross_entropy(called(ids), ids) + penalty * squares).backward()
    right = plain.embed.weight.grad
    after_backward = distance()
    optimizer.step()
    return after_backward, distance()


cases = {
    "F.linear(hidden, embed.weight)": distances("functional"),
    "a tied module": distances("module"),
    "no tie": distances("own"),
    "no tie, a penalty of the weights' squares": distances("own", penalty=0.1),
}
for name, (backward, step) in cases.items():
    print(f"{name}: after backward() {backward}, in step() {step}")
    lost = "linear" in name or "penalty" in name
    assert backward == 0 and (step > 0.1 if lost else step == 0), name
PY
