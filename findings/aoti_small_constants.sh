#!/usr/bin/env bash
# torch 2.13.0, CPU: a package of AOTInductor keeps no counter, and no bias of up to 8 elements can be updated in it.
#
# A model that counts its calls writes into a buffer: self.calls.add_(1). torch.export keeps that, and the program's module()
# goes on counting. So does a package of AOTInductor for a buffer of 8 elements. For one of a single element each call begins
# with the exported value again: the first call, which is what one compares, is right, and every later one is as the first. A
# parameter of one dimension and up to 8 elements, or of none (a scale, a router's bias, the bias of a small head), is a number
# in the compiled code: it is not among the constants, and load_constants, by which trained weights come into the package, takes
# no state that has it. One of 9 elements, or of 1 x 1, is a constant as all others. Nothing says so when it is compiled.
#
# Seen, first element of buffers to which each call adds 1, three calls: exported 1 2 3 for all; package, 0 dimensions 1 1 1,
# one element 1 1 1, 8 elements 1 2 3, 2 x 2 1 2 3; parameters among the constants: 9 elements, 1 x 1; not 0 dimensions, 1 and 8
# elements; load_constants of the model's own state_dict: RuntimeError, "Constant not found: p1"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! command -v g++ > /dev/null; then
  echo "AOTInductor needs a C++ compiler on a CPU, and this machine has no g++" && exit
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/package.py" <<'PY'
import sys

import torch
from torch import nn

buffers = {"b0": torch.tensor(0.0), "b1": torch.zeros(1), "b8": torch.arange(8.0), "b2x2": torch.arange(4.0).view(2, 2)}
parameters = {"p0": torch.tensor(0.5), "p1": torch.rand(1), "p8": torch.rand(8), "p9": torch.rand(9), "p1x1": torch.rand(1, 1)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x):
        for name in buffers:
            getattr(self, name).add_(1)
        return [x + getattr(self, name) for name in (*buffers, *parameters)]


model, x = Model(), torch.zeros(1)
state = {name: value.detach().clone() for name, value in model.state_dict().items()}
program = torch.export.export(model, (x,))
path = torch._inductor.aoti_compile_and_package(program, package_path=f"{sys.argv[1]}/model.pt2")
module, package = program.module(), torch._inductor.aoti_load_package(path)
exported, packaged = ([[t.flatten()[0].item() for t in f(x)] for _ in range(3)] for f in (module, package))
for index, name in enumerate(buffers):
    seen = [calls[index] for calls in exported], [calls[index] for calls in packaged]
    print(f"{name}: exported {seen[0]}, package {seen[1]}")
    assert seen[0] == [1.0, 2.0, 3.0] and seen[1] == ([1.0] * 3 if name in ("b0", "b1") else seen[0])
constants = set(package.get_constant_fqns())
print("parameters among the constants:", sorted(constants & set(parameters)))
assert constants & set(parameters) == {"p9", "p1x1"} and set(buffers) <= constants
try:
    package.load_constants(state, check_full_update=True)
except RuntimeError as error:
    print("load_constants:", error)
    assert "Constant not found: p" in str(error)
else:
    raise AssertionError("the state was taken")
PY
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/package.py" "$folder" 2>/dev/null
