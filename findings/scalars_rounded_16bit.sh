#!/usr/bin/env bash
# torch 2.13.0, CPU: 0.999 ** positions is 1 for all bf16 positions, and x ** 0.999 is x: some operators round the number.
#
# A Python number beside a 16-bit tensor does not change its dtype, and one takes it that it keeps its own value: x * 0.999 and
# x / 0.999 are computed in fp32 and rounded once, and so are lerp, addcmul, leaky_relu. Others put the number into the tensor's
# dtype first, and bf16 has nothing between 0.9961 and 1. A base or an exponent of 0.999 becomes 1 (a decay over distances, a
# schedule, an annealed power), x % (2 pi) is taken to another circle, xlogy(x, 1.003) is 0. In fp16 the alpha of add is lost
# where it is below 3e-8. Compiled, the same lines are right. _foreach_pow is as wrong as pow.
#
# Seen, of 100 and 1000 in bf16, eager, compiled: 0.999 ** x 1 and 1, 0.906 and 0.367; x ** 0.999 100 and 1000, 99.5 and 992; x
# % 6.2831853 5.78 and 1.28, 5.75 and 0.97; xlogy(x, 1.003) 0 and 0, 0.30 and 3.0; fp16 zeros.add(x, alpha=1e-8) 0 and 0, 1.0e-6
# and 1.0e-5; x * 1.003 right in both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! command -v g++ > /dev/null; then
  echo "torch.compile needs a C++ compiler on a CPU, and this machine has no g++" && exit
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/scalars.py" <<'PY'
import torch

cases = {
    "0.999 ** x": (torch.bfloat16, lambda x: 0.999**x, False),
    "foreach 0.999 ** x": (torch.bfloat16, lambda x: torch._foreach_pow(0.999, [x])[0], False),
    "x ** 0.999": (torch.bfloat16, lambda x: x**0.999, False),
    "x % 6.2831853": (torch.bfloat16, lambda x: x % 6.2831853, False),
    "xlogy(x, 1.003)": (torch.bfloat16, lambda x: torch.xlogy(x, 1.003), False),
    "add, alpha 1e-8": (torch.float16, lambda x: torch.add(torch.zeros_like(x), x, alpha=1e-8), False),
    "x * 1.003": (torch.bfloat16, lambda x: x * 1.003, True),
    "x / 1.003": (torch.bfloat16, lambda x: x / 1.003, True),
    "lerp 0.003": (torch.bfloat16, lambda x: torch.lerp(torch.zeros_like(x), x, 0.003), True),
    "addcmul 0.003": (torch.bfloat16, lambda x: torch.addcmul(torch.zeros_like(x), x, torch.ones_like(x), value=0.003), True),
}
for dtype in (torch.bfloat16, torch.float16):
    x = torch.tensor([100.0, 1000.0], dtype=dtype)
    functions = {name: (function, right) for name, (of, function, right) in cases.items() if of is dtype}
    together = torch.compile(lambda x: [function(x) for function, _ in functions.values()])
    for (name, (function, right)), compiled in zip(functions.items(), together(x)):
        eager, wanted, compiled = function(x).double(), function(x.double()), compiled.double()
        unit = torch.finfo(dtype).eps * wanted.abs() + (6e-8 if dtype is torch.float16 else 0)
        found = ((eager - wanted).abs() <= unit).all().item()
        print(f"{name}: eager {eager.tolist()}, compiled {compiled.tolist()}, right {wanted.tolist()}")
        assert torch.equal(eager, x.double()) if name == "x ** 0.999" else found == right, name
        assert ((compiled - wanted).abs() <= unit).all(), name
PY
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/scalars.py" 2>/dev/null
