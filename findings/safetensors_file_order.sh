#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0: a file does not keep the order of the dict that was saved.
#
# Tensors are written by the size of their dtype, widest first, which keeps them aligned, and then by name as text:
# layer 10 lies before layer 2, and every fp32 norm weight lies before the first fp16 matrix. So reading a model layer by
# layer, in the order in which it runs, jumps about in the file; offsets have to be sorted for a sequential read.
#
# Seen, saved in the order norm.2 (fp32), layers.0, 2, 10 (fp16), mask (uint8), scale (fp64): scale, norm.2, layers.0,
# layers.10, layers.2, mask
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy safetensors==0.8.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import json
import struct

import torch
from safetensors.torch import save

tensors = {"norm.2": torch.ones(3)}
tensors |= {f"layers.{index}": torch.ones(4, dtype=torch.float16) for index in (0, 2, 10)}
tensors |= {"mask": torch.ones(3, dtype=torch.uint8), "scale": torch.ones(1, dtype=torch.float64)}
data = save(tensors)
(length,) = struct.unpack("<Q", data[:8])
header = json.loads(data[8 : 8 + length])
order = sorted(header, key=lambda name: header[name]["data_offsets"])
print("saved", list(tensors), "in the file", order)
assert order == ["scale", "norm.2", "layers.0", "layers.10", "layers.2", "mask"]
PY
