#!/usr/bin/env bash
# torch 2.13.0: torch._foreach_add_(tensors, t) with a t of no dimension reads the value of t on the host.
#
# The operator has an overload for a tensor (aten::_foreach_add_.Tensor), made so that nothing is read. But the Python binding
# tries the overload for a number first, which accepts a tensor of no dimension. So the host waits for the GPU at every
# call, unseen: an optimizer that counts its steps so ("nothing here waits for the device") waits once a step. On meta
# tensors, which have no values, the call fails. torch.ops.aten._foreach_add_.Tensor(tensors, t) does what is meant.
#
# Seen: the call by its Python name runs _local_scalar_dense, _foreach_add_.Scalar; by the operator: _foreach_add_.Tensor
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


steps, one = [torch.zeros(1), torch.zeros(1)], torch.ones(())
with Names() as by_name:
    torch._foreach_add_(steps, one)
with Names() as by_operator:
    torch.ops.aten._foreach_add_.Tensor(steps, one)
print(by_name.names, by_operator.names)
assert by_name.names == ["_local_scalar_dense.default", "_foreach_add_.Scalar"]
assert by_operator.names == ["_foreach_add_.Tensor"]
assert [step.item() for step in steps] == [2.0, 2.0]
PY
