#!/usr/bin/env bash
# torch 2.13.0: load_state_dict() of an optimizer of one's own rounds fp32 state of 16-bit weights to 16 bits, integers too.
#
# Whoever trains bf16 weights keeps their moments or a master copy in fp32 in the optimizer's state. state_dict() has them as
# they are, and a checkpoint is exact. torch.optim.Optimizer.load_state_dict casts every tensor of a parameter whose dtype is
# floating to that dtype, except one under the name "step". So a resumed training goes on with masters of 8 bits, which is what
# they were there to prevent; a count of 257 is 256.0, quantised moments become floats, ids above 2^24 are rounded beside fp32
# weights. The other dtype stays for the rest of the run, and nothing is said. transformers' Adafactor, which computes in fp32,
# is such an optimizer. Values that are no tensors stay, and so does what an optimizer puts back in its own load_state_dict.
#
# Seen, dtype in the state and after loading it: bf16 weight: master float32 bfloat16, count int64 bfloat16, codes uint8
# bfloat16, step float32 float32; fp32 weight: count int64 float32; a master of 1.001 is 1.0. transformers' Adafactor, bf16
# weights: exp_avg and both factors float32 bfloat16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import io

import torch
from transformers.optimization import Adafactor


class Own(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {
                "step": torch.tensor(257.0),
                "master": torch.full(p.shape, 1.001),
                "count": torch.tensor(257),
                "codes": torch.arange(4, dtype=torch.uint8).expand(p.shape).clone(),
            }


def loaded(make, dtype):
    """Return the state of one parameter after a step, and after it was saved and loaded."""
    states, file = [], io.BytesIO()
    for _ in range(2):
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        optimizer = make([weight])
        if states:
            file.seek(0)
            optimizer.load_state_dict(torch.load(file))
        else:
            optimizer.step()
            torch.save(optimizer.state_dict(), file)
        states.append(optimizer.state[weight])
    return states


def dtypes(states):
    names = [name for name, value in states[0].items() if isinstance(value, torch.Tensor)]
    return {name: tuple(str(state[name].dtype)[6:] for state in states) for name in names}


own = loaded(Own, torch.bfloat16)
found, single = dtypes(own), dtypes(loaded(Own, torch.float32))
print("bf16:", found, "master", own[0]["master"][0, 0].item(), own[1]["master"][0, 0].item())
print("fp32:", single)
narrowed = ("float32", "bfloat16")
assert found["step"] == ("float32", "float32") and found["master"] == narrowed
assert found["count"] == ("int64", "bfloat16") and found["codes"] == ("uint8", "bfloat16")
assert own[0]["count"] == 257 and own[1]["count"] == 256 and own[1]["master"][0, 0] == 1.0
assert single["count"] == ("int64", "float32") and single["codes"] == ("uint8", "float32")

adafactor = dtypes(loaded(lambda p: Adafactor(p, lr=0.01, relative_step=False, beta1=0.9), torch.bfloat16))
print("Adafactor:", adafactor)
assert all(adafactor[name] == narrowed for name in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"))
PY
