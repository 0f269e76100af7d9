#!/usr/bin/env bash
# torch 2.13.0: autocast reaches into the body of an operator that is written in Python, and narrows what it computes.
#
# An operator of one's own (torch.library.custom_op, Library.impl, a Function's forward) is opaque: autocast has no rule for it, so
# one expects it to compute as it is written. Its inputs are left alone indeed. But its Python runs with autocast on, and each
# matrix product in it becomes bf16: one that widens its operands by .float() to be exact as well. The result has another dtype
# than the fake implementation says (so that what is compiled or planned from it does not fit), and a backward that multiplies by
# saved fp32 tensors raises. torch.autocast(enabled=False) inside keeps it out.
#
# Seen, x @ w of fp32 in an operator, dtype and error under autocast to bf16: custom_op bfloat16, 2e-2; x.float() @ w.float()
# bfloat16, 2e-2; Library.impl and Function the same; fake result float32; backward: RuntimeError (BFloat16 != float); with
# autocast off inside: float32, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def make(name, body):
    """Return an operator with this body, a fake result of the input's dtype, and the usual backward of a product."""
    operator = torch.library.custom_op(f"here::{name}", body, mutates_args=())
    operator.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
    operator.register_autograd(
        lambda ctx, g: (g @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ g),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return operator


def plain(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def widened(x: Tensor, w: Tensor) -> Tensor:
    return x.float() @ w.float()


def guarded(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x @ w


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return x @ w


library = torch.library.Library("there", "DEF")
library.define("product(Tensor x, Tensor w) -> Tensor")
library.impl("product", plain, "CPU")

torch.manual_seed(0)
x, w = torch.randn(8, 16), torch.randn(16, 8, requires_grad=True)
right = (x @ w).detach()
product = make("plain", plain)
operators = {
    "custom_op": product,
    "widened": make("widened", widened),
    "Library.impl": torch.ops.there.product,
    "Function": Function.apply,
    "guarded": make("guarded", guarded),
}
seen = {}
for name, operator in operators.items():
    with torch.autocast("cpu", torch.bfloat16):
        result = operator(x, w)
    seen[name] = result.dtype, (result.detach().float() - right).abs().max().item()
    print(f"{name}: {result.dtype}, error {seen[name][1]:.0e}")
mode = FakeTensorMode()
fakes = mode.from_tensor(x), mode.from_tensor(w.detach())
with mode, torch.autocast("cpu", torch.bfloat16):
    fake = product(*fakes).dtype
with torch.autocast("cpu", torch.bfloat16):
    result = product(x, w)
try:
    result.sum().backward()
    raised = "nothing"
except RuntimeError as error:
    raised = str(error)
print(f"fake result {fake}; backward raises: {raised}")
assert all(seen[name][0] is torch.bfloat16 for name in operators if name != "guarded")
assert all(seen[name][1] > 1e-3 for name in operators if name != "guarded")
assert seen["guarded"] == (torch.float32, 0.0) and fake is torch.float32 and "same dtype" in raised
PY
