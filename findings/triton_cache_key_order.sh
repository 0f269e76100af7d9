#!/usr/bin/env bash
# triton 3.6.0 (that of torch 2.11): the name under which a compiled kernel is kept on disk depends on which kernels the
# process has named before it, so that the same kernel is compiled again by a process that launches in another order.
#
# A kernel's key is a hash of its source, of the keys of the device functions that it calls, and of the values of global
# tl.constexpr that it and they read. The globals of a device function are taken over before its own key is worked out,
# and only that fills them in: they count if another kernel has called the function earlier, else not. A kernel that
# reads the global itself, or is handed the value as a parameter's default, has one key. 3.9.0 has one key for all.
#
# Seen: device function reads it: 2 keys; kernel reads it: 1 key; default of a parameter: 1 key
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.6.0
cat > "$folder/keys.py" <<'PY'
import sys

import triton
import triton.language as tl

WIDTH = tl.constexpr(32)


@triton.jit
def reads(x):
    return x * WIDTH


@triton.jit
def defaults(x, WIDTH: tl.constexpr = WIDTH):
    return x * WIDTH


@triton.jit
def by_function(p):
    tl.store(p, reads(tl.load(p)))


@triton.jit
def by_itself(p):
    tl.store(p, tl.load(p) * WIDTH)


@triton.jit
def by_default(p):
    tl.store(p, defaults(tl.load(p)))


@triton.jit
def another(p):
    tl.store(p, reads(defaults(tl.load(p))))


if sys.argv[1] == "after":
    another.cache_key
print(by_function.cache_key, by_itself.cache_key, by_default.cache_key)
PY
first=($("$folder/venv/bin/python" "$folder/keys.py" first))
after=($("$folder/venv/bin/python" "$folder/keys.py" after))
again=($("$folder/venv/bin/python" "$folder/keys.py" first))
test "${first[*]}" = "${again[*]}"
count() { if [ "${first[$1]}" = "${after[$1]}" ]; then echo "1 key"; else echo "2 keys"; fi; }
seen="device function reads it: $(count 0); kernel reads it: $(count 1); default of a parameter: $(count 2)"
echo "$seen"
test "$seen" = "device function reads it: 2 keys; kernel reads it: 1 key; default of a parameter: 1 key"
