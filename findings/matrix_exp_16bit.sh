#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.matrix_exp of a bf16 or fp16 matrix is noise of 1e30 or NaN: exp of a 2 x 2 identity is -1.3e30.
#
# The 16-bit dtypes are taken, nothing is raised, and the result has the right shape and dtype. One expects e, to a rounding.
# Zeros, 1 x 1 matrices, fp32 and fp64 are right; of everything else no digit is, small matrices (0.001 times an identity, where
# the answer is 1.001) as little as large ones. It is no overflow, and the same numbers come each time. Under autocast a product
# that goes into matrix_exp is 16 bits wide, and brings it there by itself. The gradient is NaN or infinite.
#
# Seen, exp of the identity of 2, e = 2.718 on the diagonal: bf16 -1.3e30, fp16 -20896; of 0.001 times the identity of 3, 1.001:
# NaN in both; of a rotation's generator, cos(1) = 0.5403: -1.3e30, -21072; of the identity under autocast -1.3e30; of zeros and
# of 1 x 1 right; gradients of the first NaN
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

matrices = {
    "identity of 2": torch.eye(2),
    "0.001 identity of 3": 0.001 * torch.eye(3),
    "rotation": torch.tensor([[0.0, 1.0], [-1.0, 0.0]]),
    "zeros": torch.zeros(3, 3),
    "1 x 1": torch.tensor([[0.5]]),
}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name, matrix in matrices.items():
        given = matrix.to(dtype).clone().detach().requires_grad_()
        result = torch.matrix_exp(given)
        again = torch.matrix_exp(given)
        result.sum().backward()
        wanted = torch.matrix_exp(given.detach().double())
        right = torch.allclose(result.double(), wanted, rtol=2e-2)
        gradient = given.grad.isfinite().all().item()
        first = f"{result[0, 0].item():.5g} ({wanted[0, 0].item():.5g})"
        print(f"{dtype}, {name}: {first}; right: {right}; finite gradient: {gradient}")
        assert result.dtype == dtype and torch.equal(result.nan_to_num(), again.nan_to_num())
        assert right == (dtype is torch.float32 or name in ("zeros", "1 x 1"))
        assert gradient or dtype is not torch.float32
with torch.autocast("cpu", torch.bfloat16):
    product = torch.matrix_exp(torch.eye(2) @ torch.eye(2))
print("under autocast", product[0, 0].item(), product.dtype)
assert product.dtype is torch.bfloat16 and abs(product[0, 0]) > 1e20
PY
