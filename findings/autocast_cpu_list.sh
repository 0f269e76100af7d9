#!/usr/bin/env bash
# torch 2.13.0: under autocast on a CPU softmax, norms, sums and powers stay in 16 bits, which on a GPU go to fp32.
#
# autocast is one interface for all devices, and one writes a model's loss in the belief that what is delicate is done in fp32:
# softmax, layer_norm, exp, pow, a norm, a sum, a cumulative sum. That is CUDA's list. A CPU has a list of its own, of some
# losses (mse, cross entropy), prod and a few others; an operator that is on neither takes what it gets, here the 16-bit output
# of a matrix product. In fp16 the square of an activation of 300 and a norm are infinite on the CPU. The same script gives
# other dtypes, and another loss, on the two. prod is in fp32, sum is not.
#
# Seen, of the output of a Linear under autocast("cpu", bf16): 17 operators of CUDA's list give bf16 (softmax, log_softmax,
# layer_norm, exp, log, pow, sum, cumsum, norm, ...), prod, mse_loss and cross_entropy fp32; fp16, 300 squared: inf, its norm
# over 64 elements 2400, over 64,000 inf; each of the 17 has a rule for CUDA in the dispatcher and none for the CPU
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F

narrow = {
    "softmax.int": lambda v: v.softmax(-1),
    "log_softmax.int": lambda v: v.log_softmax(-1),
    "layer_norm": lambda v: F.layer_norm(v, v.shape[-1:]),
    "exp": lambda v: v.exp(),
    "log": lambda v: v.abs().log(),
    "log1p": lambda v: v.abs().log1p(),
    "expm1": lambda v: v.expm1(),
    "rsqrt": lambda v: v.abs().rsqrt(),
    "reciprocal": lambda v: v.reciprocal(),
    "pow.Tensor_Scalar": lambda v: v.pow(2),
    "sum.dim_IntList": lambda v: v.sum(-1),
    "sum": lambda v: v.sum(),
    "cumsum": lambda v: v.cumsum(-1),
    "cumprod": lambda v: v.cumprod(-1),
    "norm.Scalar": lambda v: v.norm(),
    "softplus": F.softplus,
    "cosh": lambda v: v.cosh(),
}
wide = {
    "prod": lambda v: v.prod(),
    "mse_loss": lambda v: F.mse_loss(v, torch.zeros_like(v)),
    "cross_entropy_loss": lambda v: F.cross_entropy(v, torch.zeros(4, dtype=torch.long)),
}
has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
torch.manual_seed(0)
layer = torch.nn.Linear(8, 8)
with torch.autocast("cpu", torch.bfloat16):
    hidden = layer(torch.randn(4, 8))
    seen = {name: function(hidden).dtype for name, function in (narrow | wide).items()}
for name in seen:
    on = [device for device in ("CPU", "CUDA") if has_rule(f"aten::{name}", f"Autocast{device}")]
    print(f"{name}: {seen[name]}, rules for {on}")
    assert seen[name] == (torch.bfloat16 if name in narrow else torch.float32), name
    assert on == ["CUDA"] if name in narrow else "CPU" in on, name
with torch.autocast("cpu", torch.float16):
    hidden = F.linear(torch.full((1000, 1), 300.0), torch.ones(64, 1))
    square, small, large = hidden.pow(2).max(), hidden[0].norm(), hidden.norm()
print("fp16, 300 squared", square, "norm over 64", small, "norm over 64,000", large)
assert square.isinf() and small == 2400 and large.isinf()
PY
