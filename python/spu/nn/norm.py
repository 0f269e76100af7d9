"""``RMSNorm`` and ``LayerNorm``: torch's modules on the fused ops; and the RMSNorms of transformers' models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.common.dtypes import HALVES, STORAGE
from spu.common.torch_private import buffers_of, parameters_of, unset_fake_temporarily
from spu.nn.blocks import MIXINS, FusedBlock, from_library
from spu.nn.table import NormBlock
from spu.ops import choose_backend, has_kernel
from spu.ops.norm import LARGEST_TRITON_ROW, fused_layer_norm, fused_rms_norm, torch_rms_norm
from spu.ops.plain import takes
from spu.ops.reference.linear import autocast_enabled

__all__ = ["FusedNorm", "LayerNorm", "RMSNorm", "norm_block"]

_FORMS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))  # (offset, rounded) of RMSNorms that the op computes


def _fused(op: str, shape: Sequence[int] | None, x: Tensor, *vectors: Tensor | None) -> str | None:
    """Return the backend whose kernel serves a norm of these tensors, over the last dimensions of ``shape`` (None: over
    the last one); None: torch's own ops do.
    """
    if not takes(x, *vectors) or x.dtype not in STORAGE or x.dim() == 0 or torch.compiler.is_compiling():
        return None  # takes() comes first: nothing else may be asked of what stands for a tensor in torch.fx
    row, dtype = x.shape[-1:], None
    if shape is not None and (len(shape) != 1 or row[0] != shape[0]):
        return None
    for vector in vectors:
        if vector is None:
            continue
        dtype = dtype or vector.dtype
        alike = vector.dtype == dtype and (dtype == x.dtype or dtype == torch.float32)
        if not alike or vector.shape != row or vector.device != x.device:
            return None
    if op == "layer_norm" and x.is_cpu and x.dtype == torch.float32:
        return None  # torch's own is as fast there, and sums in fp32 too
    backend = choose_backend(x)
    fits = backend != "triton" or row[0] <= LARGEST_TRITON_ROW
    return backend if fits and backend != "reference" and has_kernel(op, backend) else None


def _widened_by_autocast(x: Tensor) -> bool:
    """Tell whether torch's module would have an fp32 result: under autocast on a CUDA device."""
    return x.is_cuda and x.dtype in HALVES and autocast_enabled("cuda")


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in one op, with an fp32 sum for the weight's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., C] -> [..., C]."""
        if torch.jit.is_scripting():
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        else:  # TorchScript compiles the branch that it takes, and no more
            weight = self.weight
            backend = _fused("rms_norm", self.normalized_shape, x, weight)
            if backend is not None and not _widened_by_autocast(x):
                return fused_rms_norm(x, weight, self.eps, backend)
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in one op, with fp32 sums for its parameters' gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute input [..., C] -> [..., C]."""
        if torch.jit.is_scripting():
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            weight, bias = self.weight, self.bias
            backend = _fused("layer_norm", self.normalized_shape, input, weight, bias)
            if backend is not None and not _widened_by_autocast(input):
                return fused_layer_norm(input, weight, bias, self.eps, backend)
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class FusedNorm(FusedBlock):
    """An RMSNorm of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute x [..., C] -> [..., C]."""
        block = self.spu_block
        assert isinstance(block, NormBlock)
        if len(args) == 1 and not kwargs:
            x, weight = args[0], self.weight
            backend = self._backend_of(x)
            if backend is not None:
                return fused_rms_norm(x, weight, float(getattr(self, block.eps)), backend, block.offset, block.rounded)  # type: ignore[arg-type]
        return self.spu_plain.forward(self, *args, **kwargs)

    def serves(self, x: Tensor) -> bool:
        """Tell whether the op computes the norm of x."""
        return self._backend_of(x) is not None

    def _backend_of(self, x: Tensor) -> str | None:
        weight, block = self.weight, self.spu_block
        # The weight multiplies a row that is rounded to 16 bits: an fp32 one would make the result fp32.
        backend = _fused("rms_norm", None, x, weight)  # type: ignore[arg-type]
        return backend if weight.dtype == x.dtype or not block.rounded else None  # type: ignore[union-attr]


MIXINS[NormBlock] = FusedNorm


def norm_block(module: nn.Module) -> NormBlock | None:
    """Return how the op computes an RMSNorm of transformers; None where it is none, or another one.

    140 classes there have one formula, and a few differ in where they round or in what they add to the weight. The
    class's own forward says which: it is run once on small values in fp16, bf16 and fp32, and must agree in every bit.
    """
    cls = type(module)
    if issubclass(cls, FusedBlock) or not from_library(cls) or "RMSNorm" not in cls.__name__:
        return None
    weight = parameters_of(module).get("weight")
    whole = list(parameters_of(module)) == ["weight"] and not buffers_of(module) and not list(module.children())
    if not whole or weight is None or weight.dim() != 1 or not weight.numel():
        return None
    options = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    eps = next((name for name in ("variance_epsilon", "eps") if isinstance(options.get(name), float)), None)
    try:
        hash(found := tuple(options.items()))
    except TypeError:
        return None
    return None if eps is None else _found(cls, eps, found, weight.numel())  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _found(cls: type[nn.Module], eps: str, options: tuple[tuple[str, Any], ...], size: int) -> NormBlock | None:
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(options)
    forms = list(_FORMS)
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wave = torch.arange(4 * size, dtype=torch.float32, device="cpu").mul(1.7).sin().view(4, size)
        rows = wave[1:] * torch.tensor([[3.0], [0.1], [1e-3]], device="cpu")  # the last: eps is a large part of it
        for dtype in STORAGE:
            x, weight = rows.to(dtype), (wave[0] * 0.4 + 1).to(dtype)
            module.weight = nn.Parameter(weight)
            try:
                y = cls.forward(module, x)
            except Exception:  # whatever it needs that a norm has not
                return None
            forms = [form for form in forms if _same(y, torch_rms_norm(x, weight, dict(options)[eps], None, *form))]
    return NormBlock(eps, *forms[0]) if forms else None


def _same(y: Any, other: Any) -> bool:
    return isinstance(y, Tensor) and y.dtype == other.dtype and torch.equal(y, other)
