#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: a look at the base model through disable_adapter() makes frozen adapter weights trainable.
#
# `with model.disable_adapter():` gives the outputs without the adapter: the reference of a preference loss, a KL term, an
# evaluation. When the context ends, the active adapter is set active again, and that sets requires_grad=True on all of its
# weights, whatever it was before. A LoRA whose A matrices are frozen (LoRA-FA) trains both from the second step on, if the
# optimizer was given them; an adapter that was loaded for inference, with is_trainable=False, has gradients and keeps a graph.
# A forward, and merge_adapter with unmerge_adapter, leave requires_grad alone.
#
# Seen, trainable tensors of 4: A frozen 2, after a forward 2, after merge and unmerge 2, after the context 4; loaded for
# inference 0, after the context 4; 5 steps of SGD: A moved by 0 without the context, by 0.026 with one before each step
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy peft==0.21.2 transformers==5.24.0
cat > "$folder/frozen.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def with_frozen_a():
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def trainable(model):
    return sum(p.requires_grad for p in model.parameters())


def moved(reference):
    """Return how far A moves in five steps on all parameters, with or without a look at the base model before each."""
    model = with_frozen_a()
    a = next(p for name, p in model.named_parameters() if "lora_A" in name)
    start = a.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        target = torch.ones(4, 8)
        if reference:
            with torch.no_grad(), model.disable_adapter():
                target = target + model(x)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (a.detach() - start).abs().max().item()


model = with_frozen_a()
counts = [trainable(model)]
model(x)
counts.append(trainable(model))
model.merge_adapter()
model.unmerge_adapter()
counts.append(trainable(model))
with model.disable_adapter():
    model(x)
counts.append(trainable(model))
model.save_pretrained(sys.argv[1])
loaded = PeftModel.from_pretrained(base(), sys.argv[1])
counts.append(trainable(loaded))
with loaded.disable_adapter():
    loaded(x)
counts.append(trainable(loaded))
print("trainable: A frozen", counts[:4], "loaded for inference", counts[4:])
assert counts == [2, 2, 2, 4, 0, 4]
without, after = moved(False), moved(True)
print("A moved by", without, "with a reference", after)
assert without == 0.0 and after > 1e-4
PY
"$folder/venv/bin/python" -W ignore "$folder/frozen.py" "$folder/adapter"
