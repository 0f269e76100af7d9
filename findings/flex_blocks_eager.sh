#!/usr/bin/env bash
# torch 2.13.0: flex_attention that is not compiled takes no notice of which blocks a BlockMask names.
#
# A BlockMask has two parts: lists of blocks, and a function mask_mod for what is in them. BlockMask.from_kv_blocks makes one
# from the lists, mask_mod is optional, and to_dense() shows what they say. The compiled kernel visits these blocks and no
# others. The uncompiled one makes a mask from mask_mod alone; without one every query sees every key. So a model whose
# sparsity is in the blocks is another model where it is debugged, tested or traced without compiling. A warning
# speaks of memory ("materializes the full scores matrix"), not of other values.
#
# Seen, 256 tokens, two blocks that each see themselves: uncompiled equal to full attention (largest difference 3e-7), and
# 0.5 away from the two blocks; compiled (where there is a C++ compiler) it is the other way round
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/blocks.py" <<'PY'
import shutil

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, 256, 16) for _ in range(3))
numbers = torch.ones(1, 1, 2, dtype=torch.int32)
blocks = BlockMask.from_kv_blocks(numbers, torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32), BLOCK_SIZE=128)
assert blocks.to_dense()[0, 0].tolist() == [[1, 0], [0, 1]]
full = F.scaled_dot_product_attention(query, key, value)
parts = [F.scaled_dot_product_attention(*(t[:, :, s] for t in (query, key, value))) for s in (slice(128), slice(128, 256))]
named = torch.cat(parts, 2)


def distances(attention):
    """Return the largest differences from the blocks that are named, and from full attention."""
    result = attention(query, key, value, block_mask=blocks)
    return (result - named).abs().max().item(), (result - full).abs().max().item()


eager = distances(flex_attention)
print(f"uncompiled: {eager[0]:.1e} from the blocks, {eager[1]:.1e} from full attention")
assert eager[0] > 0.1 and eager[1] < 1e-5
if shutil.which("g++"):
    compiled = distances(torch.compile(flex_attention))
    print(f"compiled: {compiled[0]:.1e} from the blocks, {compiled[1]:.1e} from full attention")
    assert compiled[0] < 1e-5 and compiled[1] > 0.1
PY
"$folder/venv/bin/python" -W ignore "$folder/blocks.py"
