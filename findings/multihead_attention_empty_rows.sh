#!/usr/bin/env bash
# torch 2.13.0, CPU: what nn.MultiheadAttention makes of a row that is all padding depends on three switches: 0 or NaN.
#
# A batch that is filled up with empty sequences has rows whose key_padding_mask is True throughout. One expects one answer for
# them. With need_weights=False the module calls scaled_dot_product_attention, which gives 0, in train() and in eval(); with
# need_weights=True, the default, it is NaN; and in eval() without gradients a fast path takes over, which gives NaN for both. So
# nn.TransformerEncoder trains on such batches with finite losses, and evaluates them to NaN (with enable_nested_tensor=True, its
# default, to 0, where training has another value). The gradients are worse: with need_weights=True those of all weights are NaN,
# even if the loss takes the other rows alone.
#
# Seen, the empty row's output in train(), in eval(), in eval() without gradients: need_weights=False 0, 0, NaN; True NaN, NaN,
# NaN; encoder finite, finite, NaN, with nested tensors finite, finite, 0; the weights' gradient from the full row's loss: NaN
# with need_weights=True, finite with False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(2, 3, 8)
padding = torch.tensor([[False, False, True], [True, True, True]])
attention = nn.MultiheadAttention(8, 2, batch_first=True)
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
nested = nn.TransformerEncoder(layer, 2)


def outputs(module, call):
    """Return what the empty row holds in train(), in eval(), and in eval() without gradients."""
    kinds = []
    for mode, gradients in ((True, True), (False, True), (False, False)):
        module.train(mode)
        with torch.set_grad_enabled(gradients):
            full, empty = call()
        assert full[:2].isfinite().all()
        kinds.append("NaN" if empty.isnan().any() else "0" if (empty == 0).all() else "finite")
    return kinds


def finite(need_weights):
    """Tell whether the gradients of a loss over the full row are finite."""
    attention.train().zero_grad()
    attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0][0].sum().backward()
    return bool(attention.in_proj_weight.grad.isfinite().all())


with torch.no_grad():
    attention.out_proj.bias.zero_()
seen = {
    need: outputs(attention, lambda: attention(x, x, x, key_padding_mask=padding, need_weights=need)[0]) for need in (False, True)
}
seen["encoder"] = outputs(encoder, lambda: encoder(x, src_key_padding_mask=padding))
seen["nested"] = outputs(nested, lambda: nested(x, src_key_padding_mask=padding))
for name, kinds in seen.items():
    print(f"{name if isinstance(name, str) else f'need_weights={name}'}: train, eval, eval without gradients:", *kinds)
print(f"gradients finite: need_weights=False {finite(False)}, True {finite(True)}")
assert seen[False] == ["0", "0", "NaN"] and seen[True] == ["NaN"] * 3
assert seen["encoder"] == ["finite", "finite", "NaN"] and seen["nested"] == ["finite", "finite", "0"]
assert finite(False) and not finite(True)
PY
