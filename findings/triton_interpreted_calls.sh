#!/usr/bin/env bash
# triton 3.9.0, TRITON_INTERPRET=1, torch 2.13.0: each call of one jitted function by another exchanges the members of
# triton.language once more, and what such a call exchanges in triton.language.core is never put back.
#
# A launch lists the members of the language's modules (inspect.getmembers), replaces the builtins by NumPy's forms and
# puts the old ones back at its end. A call inside the kernel does the same again, in every program of the grid, and
# forgets what it has replaced. tl.cdiv, tl.sum, tl.zeros and others are jitted functions too. So a helper that is called
# in a loop takes most of an interpreted kernel's time (calls written out by hand take a seventh), and after one tl.cdiv
# the process goes on with an interpreted triton.language.core.
#
# Seen: lists of members for 100 additions in a loop, 1 and 2 programs: written out 4, 4; by a jitted function 404, 804.
# Members of triton.language.core that stay exchanged after a launch: by an addition 0, by tl.cdiv 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.2.6
cat > "$folder/calls.py" <<'PY'
import inspect

import torch
import triton
import triton.language as tl

lists, getmembers = 0, inspect.getmembers


def counted(*arguments):
    global lists
    lists += 1
    return getmembers(*arguments)


inspect.getmembers = counted


@triton.jit
def plus(x, y):
    return x + y


@triton.jit
def written_out(p, COUNT: tl.constexpr):
    x = tl.load(p)
    for _ in range(COUNT):
        x = x + 1.0
    tl.store(p, x)


@triton.jit
def by_function(p, COUNT: tl.constexpr):
    x = tl.load(p)
    for _ in range(COUNT):
        x = plus(x, 1.0)
    tl.store(p, x)


@triton.jit
def dividing(p, COUNT: tl.constexpr):
    tl.store(p, tl.load(p) + tl.cdiv(COUNT, 2))


def launch(kernel, programs):
    global lists
    lists, before = 0, dict(vars(tl.core))
    kernel[(programs,)](torch.zeros(1), 100)
    return lists, sum(vars(tl.core)[name] is not member for name, member in before.items())


launch(written_out, 1)  # the first one imports
out, function = ([launch(kernel, programs) for programs in (1, 2)] for kernel in (written_out, by_function))
left = launch(dividing, 1)[1]
print("lists:", [count for count, _ in out], [count for count, _ in function])
print("stay exchanged:", out[0][1], left)
assert [count for count, _ in out] == [4, 4]
assert [count for count, _ in function] == [404, 804]
assert (out[0][1], left) == (0, 64)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/calls.py"
