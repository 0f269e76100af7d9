#!/usr/bin/env bash
# torch 2.13.0: vmap's in_dims for a dict are paired by position; in another order each key gets the other key's dimension.
#
# vmap(f, in_dims=({"a": 0, "b": None},)) says that a is mapped and b is shared. Dicts with the same keys are equal in Python in
# any order, and in torch's own tree_map, jvp and vjp they are paired by key, or refused. vmap takes the dimensions in the order
# in which in_dims was written, and the tensors in the order of the argument: for {"b": ..., "a": ...} it maps b and shares a.
# Nothing is raised where the sizes allow both, as for weights or statistics of equal sizes, and the result has the right shape.
# A dict of parameters that was loaded from a file may come in another order. out_dims are the same.
#
# Seen, f = 10 sum(a) + sum(b), a = [0, 1, 2] mapped, b = [1, 1, 1] shared, right is [3, 13, 23]: same order [3, 13, 23];
# argument in the other order [31, 31, 31]; jvp with tangents in another order raises; tree_map pairs by key
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.func import jvp, vmap
from torch.utils._pytree import tree_map


def f(tensors):
    return 10 * tensors["a"].sum() + tensors["b"].sum()


a, b = torch.tensor([0.0, 1.0, 2.0]), torch.ones(3)
in_dims = ({"a": 0, "b": None},)
same = vmap(f, in_dims=in_dims)({"a": a, "b": b}).tolist()
other = vmap(f, in_dims=in_dims)({"b": b, "a": a}).tolist()
print(f"same order {same}, other order {other}")
assert {"a": a, "b": b}.keys() == {"b": b, "a": a}.keys()
assert same == [3.0, 13.0, 23.0] and other == [31.0, 31.0, 31.0]


def g(x):
    return {"a": x + a, "b": x.sum().expand(2)}


def transposed(x):
    return {"a": x.outer(torch.ones(3)), "b": x.outer(torch.ones(3))}


rows = torch.ones(4, 2)
for out_dims in ({"a": 0, "b": 2}, {"b": 2, "a": 0}):
    shapes = {key: tuple(value.shape) for key, value in vmap(transposed, out_dims=out_dims)(rows).items()}
    print(f"out_dims {out_dims}: shapes {shapes}")
    assert shapes == ({"a": (4, 2, 3), "b": (2, 3, 4)} if list(out_dims) == ["a", "b"] else {"a": (2, 3, 4), "b": (4, 2, 3)})
assert tree_map(lambda x, y: (x, y), {"a": 1, "b": 2}, {"b": 4, "a": 3}) == {"a": (1, 3), "b": (2, 4)}
try:
    jvp(f, ({"a": a, "b": b},), ({"b": b, "a": a},))
except RuntimeError as error:
    print("jvp raises", str(error)[:60])
else:
    raise AssertionError("jvp took another order")
PY
