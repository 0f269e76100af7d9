#!/usr/bin/env bash
# triton 3.6.0 (that of torch 2.11), compiling for sm_90, no GPU needed: a persistent product whose loop over tiles has
# tl.range(..., flatten=True) does not compile once its body holds a second loop, in an `if`.
#
# Flattening makes one loop of the loop over tiles and of the loop over the inner dimension, so that the next tile's loads
# are on their way during a tile's epilogue. A second loop in the body (here: sums of an operand's rows, for the tiles of
# the first column alone) makes the pass that does it build an `scf.if` with the wrong number of results; the compiler's
# own check finds it, and Python sees "PassManager::run failed". The same kernel compiles without flatten, and with
# flatten where the second loop is compiled out. 3.9.0 compiles all three.
#
# Seen: sums, nested: compiles; no sums, flattened: compiles; sums, flattened: RuntimeError: PassManager::run failed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.6.0
cat > "$folder/product.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, sums, tiles, K, SUMS: tl.constexpr, FLAT: tl.constexpr):
    from_a = tl.make_tensor_descriptor(a, shape=[tiles * 128, K], strides=[K, 1], block_shape=[128, 64])
    from_b = tl.make_tensor_descriptor(b, shape=[128, K], strides=[K, 1], block_shape=[128, 64])
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        acc = tl.zeros((128, 128), tl.float32)
        for k in range(0, K, 64):
            acc = tl.dot(from_a.load([index * 128, k]), from_b.load([0, k]).T, acc)
        rows = index * 128 + tl.arange(0, 128)
        tl.store(out + rows[:, None] * 128 + tl.arange(0, 128)[None, :], acc)
        if SUMS and index == 0:
            total = tl.zeros((128, 64), tl.float32)
            for k in range(0, K, 64):
                total += tl.load(a + rows[:, None] * K + k + tl.arange(0, 64)[None, :]).to(tl.float32)
            tl.store(sums + rows, tl.sum(total, 1))


TYPES = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "sums": "*fp32", "tiles": "i32", "K": "i32"}
ALIGNED = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 5)}
found = {}
for sums, flat in ((True, False), (False, True), (True, True)):
    source = ASTSource(product, TYPES | {"SUMS": "constexpr", "FLAT": "constexpr"}, {(6,): sums, (7,): flat}, ALIGNED)
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        found[sums, flat] = "compiles"
    except RuntimeError as error:
        found[sums, flat] = f"RuntimeError: {error}"
    print(f"{'sums' if sums else 'no sums'}, {'flattened' if flat else 'nested'}: {found[sums, flat]}")
assert found[True, False] == found[False, True] == "compiles"
assert "PassManager" in found[True, True]
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/product.py" 2> "$folder/log" || {
  tail -5 "$folder/log"
  exit 1
}
