#!/usr/bin/env bash
# torch 2.13.0: under autocast on a CPU two tensors of the other 16-bit dtype cannot be joined, also where both have the same.
#
# autocast("cpu", bf16) is a rule for operators that gain from 16 bits; what is in another dtype already, fp32 or fp64, passes
# through the rest as it is. So one takes fp16 values through a bf16 region for granted: a sum of two is fp16, a product of two
# is converted. But cat, stack and index_copy are on the list of operators whose arguments are brought to the widest dtype
# among them, and the search for the widest knows autocast's own dtype, fp32 and fp64 alone: two fp16 tensors, or a single
# one, raise a RuntimeError that names neither the operator nor a dtype. So do the functions that join within: hstack, vstack,
# column_stack, cartesian_prod, combinations. With fp16 for bf16 the same. A loss's microbatches, a key-value cache or the
# heads of a model in fp16 are joined so.
#
# Seen under autocast("cpu", bf16): cat, stack and index_copy of fp32 and of fp64 tensors keep their dtype, of bf16 ones too;
# of fp16 ones: RuntimeError "Unexpected floating ScalarType in at::autocast::prioritize", also for one tensor and beside an
# fp32 one; fp16 + fp16 is fp16, fp16 @ fp16 is bf16. Under autocast("cpu", fp16) bf16 takes fp16's part
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

first = torch.tensor([0])
joins = {
    "cat": lambda t: torch.cat([t, t]),
    "cat of one": lambda t: torch.cat([t]),
    "cat with fp32": lambda t: torch.cat([t, t.float()]),
    "stack": lambda t: torch.stack([t, t]),
    "index_copy": lambda t: t.index_copy(0, first, t[:1]),
    "hstack": lambda t: torch.hstack([t, t]),
    "vstack": lambda t: torch.vstack([t, t]),
    "column_stack": lambda t: torch.column_stack([t, t]),
    "cartesian_prod": lambda t: torch.cartesian_prod(t[0], t[0]),
    "combinations": lambda t: torch.combinations(t[0]),
}


def joined(function, tensor):
    try:
        return function(tensor).dtype
    except RuntimeError as error:
        return str(error).splitlines()[0]


halves = (torch.bfloat16, torch.float16)
for around, other in (halves, halves[::-1]):
    for dtype in (around, torch.float32, torch.float64, other):
        tensor = torch.ones(2, 2, dtype=dtype)
        with torch.autocast("cpu", around):
            seen = {name: joined(function, tensor) for name, function in joins.items()}
            added, multiplied = (tensor + tensor).dtype, (tensor @ tensor).dtype
        print(around, dtype, {str(value) for value in seen.values()}, "sum", added, "product", multiplied)
        assert added == dtype
        if dtype == other:
            assert all("Unexpected floating ScalarType" in str(value) for value in seen.values()), seen
            assert multiplied == around
        else:
            wide = {name: torch.promote_types(dtype, torch.float32) if "fp32" in name else dtype for name in joins}
            assert seen == wide, seen
PY
