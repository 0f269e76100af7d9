"""What can be reached from some objects, in a form that can be compared: identities, values, versions, gradients."""

from __future__ import annotations

import functools
import gc
import types

import torch
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def snapshot(*roots):
    """{path: what is there}; two snapshots of the same objects are equal if nothing has changed."""
    found, seen, left = {}, {}, [(f"{k}", root) for k, root in enumerate(roots)]
    while left:
        path, value = left.pop()
        if isinstance(value, _PLAIN):
            found[path] = value
            continue
        found[path] = (type(value), id(value))
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            found[path] += (value._version, tuple(value.shape), value.dtype, value.detach().tolist())
            found[path] += (str(value._backward_hooks), value.requires_grad)
            left.append((f"{path}.grad", value.grad if value.is_leaf else None))
        elif isinstance(value, dict):
            found[path] += (list(map(str, value)),)
            left += [(f"{path}[{key!r}]", entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple | set):
            found[path] += (len(value),)
            left += [(f"{path}[{k}]", entry) for k, entry in enumerate(value)]
        elif isinstance(value, types.MethodType):
            left += [(f"{path}.self", value.__self__), (f"{path}.func", value.__func__)]
        elif isinstance(value, functools._lru_cache_wrapper):
            found[path] += (value.cache_info().currsize,)
        elif isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or ())
            left += [(f"{path}<{name}>", cell.cell_contents) for name, cell in cells]
            left += [
                (f"{path}::{name}", value.__globals__[name])
                for name in value.__code__.co_names
                if name.isupper() and name in value.__globals__
            ]
        elif type(value).__module__.split(".")[0] not in ("builtins", "spu"):
            left += [(f"{path}.{name}", entry) for name, entry in getattr(value, "__dict__", {}).items()]
            forward = getattr(type(value), "forward", None)
            left.append((f"{path}.forward", forward))
            if "test" in type(value).__module__:
                left += [(f"{path}.class.{k}", v) for k, v in vars(type(value)).items() if not k.startswith("__")]
    return {"objects": found, "alive": list(seen.values())}["objects"]


def fakes():
    """Every fake tensor that something still holds."""
    gc.collect()
    return [value for value in gc.get_objects() if type(value) is FakeTensor]


def difference(before, after):
    """The paths whose contents differ, for a message."""
    keys = [k for k in before.keys() | after.keys() if before.get(k, "absent") != after.get(k, "absent")]
    return {k: (before.get(k, "absent"), after.get(k, "absent")) for k in sorted(keys)[:5]}
