#!/usr/bin/env bash
# peft 0.21.2: saving a LoRA with biases warns that its tensors are incomplete; the file is whole.
#
# lora_bias=True gives lora_B a bias, a vector as every bias is. save_pretrained takes any one-dimensional tensor whose
# name holds lora_B for a shard that DeepSpeed or FSDP did not gather, and says so. What it wrote loads again, and gives
# the same outputs to the last bit. The same model saved with state_dict=model.state_dict() is written without a word.
#
# Seen: 1 warning (invalid shape: base_model.model.0.lora_B.bias:(3,)); with state_dict 0 warnings; outputs equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy
FOLDER="$folder" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import copy
import os
import warnings

import peft
import torch

folder = os.environ["FOLDER"]
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(4, 3))
config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
model = peft.get_peft_model(copy.deepcopy(base), config).eval()


def words(**more):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(f"{folder}/adapter", **more)
    return [str(w.message) for w in said if "invalid shape" in str(w.message)]


alone, given = words(), words(state_dict=model.state_dict())
print(len(alone), "warning:", alone[0][:90], "; with state_dict", len(given), "warnings")
assert len(alone) == 1
assert "lora_B.bias:(3,)" in alone[0]
assert "were not gathered before save_pretrained() and are therefore incomplete" in alone[0]
assert not given
x = torch.randn(5, 4)
again = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
assert torch.equal(again(x), model(x))
print("outputs equal")
PY
