#!/usr/bin/env bash
# sentence-transformers 6.2.0 with torch 2.13.0: under autocast a cached loss computes its values in bf16, its gradients in fp32.
#
# CachedMultipleNegativesRankingLoss embeds a large batch twice: without a graph for the loss, and piece by piece with one for the
# gradients. Its documentation lets the second pass repeat the first exactly, and the state of random numbers is put back
# for that. The second pass runs inside backward(), which torch's recipe for mixed precision leaves outside of autocast, and
# autocast is not put back. So the part that costs time and memory, for whose sake one takes this loss, is fp32 (on a GPU the
# slow products), and the cached gradients belong to other embeddings than those they are applied to. The loss that is not
# cached keeps bf16 in both. With backward() inside autocast, or autocast inside of the model's forward, it is bf16 throughout.
#
# Seen, dtypes of the embeddings without and with a graph: not cached (none), bf16; cached bf16, fp32; with backward() inside
# autocast bf16, bf16; with autocast inside the forward bf16, bf16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 sentence-transformers==6.2.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import contextlib

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn


class Embedder(nn.Module):
    """A linear layer as a module of SentenceTransformer, which records its outputs' dtypes."""

    def __init__(self, autocast):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.autocast = autocast
        self.dtypes = {False: set(), True: set()}

    def forward(self, features):
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext():
            out = self.layer(features["input_ids"])
        self.dtypes[torch.is_grad_enabled()].add(str(out.dtype).removeprefix("torch."))
        return {**features, "sentence_embedding": out}


def dtypes(kind, backward_inside=False, in_forward=False, **options):
    """Return the dtypes of the embeddings without and with a graph."""
    torch.manual_seed(0)
    embedder = Embedder(in_forward)
    loss = kind(SentenceTransformer(modules=[embedder], device="cpu"), **options)
    columns = [{"input_ids": torch.randn(8, 32)} for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(columns, None)
        if backward_inside:
            value.backward()
    if not backward_inside:
        value.backward()
    assert embedder.layer.weight.grad.any()
    return [sorted(embedder.dtypes[graph]) for graph in (False, True)]


cached = CachedMultipleNegativesRankingLoss
cases = {
    "not cached": (dtypes(MultipleNegativesRankingLoss), [[], ["bfloat16"]]),
    "cached": (dtypes(cached, mini_batch_size=4), [["bfloat16"], ["float32"]]),
    "cached, backward() in autocast": (dtypes(cached, backward_inside=True, mini_batch_size=4), [["bfloat16"]] * 2),
    "cached, autocast in the forward": (dtypes(cached, in_forward=True, mini_batch_size=4), [["bfloat16"]] * 2),
}
for name, (seen, expected) in cases.items():
    print(f"{name}: without a graph {seen[0]}, with one {seen[1]}")
    assert seen == expected, (name, expected)
PY
