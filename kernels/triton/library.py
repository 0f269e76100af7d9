"""Products by cuBLASLt, which ``spu._cuda`` looks up in the process and calls by addresses.

It is the kind "cublaslt" of a configuration, for fp16 and bf16 operands whose rows start at multiples of 16 bytes. In
its own epilogue it adds the bias, takes the gelu of the form with tanh and keeps what that was taken of; weight
gradients are scaled by ``inv_scale`` where it lies, in device memory, and added to fp32 ``main_grad`` as they are made.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spu.kernels.launch import ACTIVATIONS

DEVICE_TYPE = "cuda"
_TYPES = {torch.float16: 0, torch.bfloat16: 1}
_FORWARD, _INPUT, _WEIGHT = 0, 1, 2
_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}


@lru_cache(maxsize=1)
def module() -> Any | None:
    """Return ``spu._cuda`` where it is built and finds a cuBLASLt that it knows; else None."""
    if importlib.util.find_spec("spu._cuda") is None:
        return None
    try:
        found = importlib.import_module("spu._cuda")
    except ImportError:
        return None
    return found if isinstance(found.cublaslt(), int) else None


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products of a dtype on a device can be asked for."""
    return dtype in _TYPES and device.type == DEVICE_TYPE and module() is not None


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    preact: Tensor | None = None,
    algorithm: int = 0,
) -> bool:
    """Compute preact = a @ b + bias, out = activation(preact), each rounded once where the library has the activation,
    else out from the rounded preact. False if it takes no such product: nothing is done then.

    Args:
        a: [M, K], b: [K, N], of any strides.
        out, preact: [M, N] elements, contiguous, a's dtype.
        bias: [N].
        algorithm: which of those that the library proposes, the best first.
    """
    added = 0 if bias is None else bias.data_ptr()
    kept = 0 if preact is None else preact.data_ptr()
    return _call(_FORWARD, a, b, out, added, kept, _ACTIVATIONS[activation], 0, 0, 0, algorithm)


def derivative(a: Tensor, b: Tensor, out: Tensor, saved: Tensor, activation: str) -> bool:
    """Compute out = (a @ b) * activation'(saved), rounded once where the library has the derivative, else from the
    rounded product, by the best algorithm that the library proposes. False: as in ``product``.

    Args:
        a: [M, K], b: [K, N], of any strides.
        out, saved: [M, N] elements, contiguous, a's dtype.
    """
    return _call(_INPUT, a, b, out, 0, saved.data_ptr(), _ACTIVATIONS[activation], 0, 0, 0, 0)


def add_weight_gradient(
    a: Tensor,
    b: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor | None,
    accumulate: bool,
    algorithm: int = 0,
) -> bool:
    """Compute main_grad (+)= inv_scale * a @ b, and found_inf = 1 if a sum of products is not finite. False and
    ``algorithm``: as in ``product``.

    Args:
        main_grad: [M, N] fp32, contiguous. Its old content is not read unless ``accumulate``.
        inv_scale, found_inf: fp32 [1], on the device.
    """
    flag = 0 if found_inf is None else found_inf.data_ptr()
    return _call(_WEIGHT, a, b, main_grad, 0, 0, 0, inv_scale.data_ptr(), flag, accumulate, algorithm)


def _call(
    form: int, a: Tensor, b: Tensor, out: Tensor, bias: int, preact: int, activation: int, inv_scale: int,
    found_inf: int, accumulate: int, algorithm: int,
) -> bool:  # fmt: skip
    """Hand addresses to the library: an op of as many arguments takes longer on the host than the launch."""
    found = module()
    assert found is not None
    (m, k), n = a.shape, b.shape[1]
    return found.multiply(  # type: ignore[no-any-return]
        max(a.get_device(), 0), form, _TYPES[a.dtype], m, n, k, a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(),
        out.data_ptr(), bias, preact, activation, inv_scale, found_inf, accumulate, algorithm,
    )  # fmt: skip
