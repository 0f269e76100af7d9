"""Arithmetic shared by the kernels: widening, rounding and activations, the same on a GPU and interpreted.

Triton's interpreter (3.9) keeps bfloat16 as raw bits: it truncates instead of rounding to nearest even, doubles
subnormals on the way up, and multiplies the bits in ``tl.dot``. Under the interpreter these helpers therefore convert
by hand; compiled, they are the hardware's conversions.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """fp16, bf16 or fp32 -> fp32, exactly."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """fp32 -> ``dtype``, to nearest, ties to even; NaN stays NaN."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v != v, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation; fp32 operands are multiplied as fp32, not TF32."""
    if INTERPRET:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def nonfinite(v):
    """True where v is infinite or NaN."""
    return (v - v) != 0.0


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of an fp32 tensor.

    gelu: z/2 (1 + erf(z / sqrt 2)); gelu_tanh: z/2 (1 + tanh u) with u = sqrt(2/pi) (z + 0.044715 z^3), written as
    z sigmoid(2u), which does not cancel for negative z; silu: z sigmoid(z). (Hendrycks and Gimpel, arXiv:1606.08415.)
    """
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return z
