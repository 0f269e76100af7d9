"""Arithmetic shared by the kernels: widening, rounding and activations, the same on a GPU and interpreted.

Triton's interpreter (3.9) keeps bfloat16 as raw bits: it truncates instead of rounding to nearest even, doubles
subnormals on the way up, and multiplies the bits in ``tl.dot``. Under the interpreter these helpers therefore convert
by hand; compiled, they are the hardware's conversions.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)


# A function, not a global tl.constexpr: whether those of a device function are part of the name under which Triton 3.6
# keeps a compiled kernel depends on the kernels launched before it, so that the next process may compile it again.
@triton.constexpr_function
def interpreted():
    """Tell whether the kernel runs interpreted."""
    return INTERPRET


@triton.jit
def widen(x):
    """Convert fp16, bf16 or fp32 to fp32, exactly."""
    if interpreted() and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """Convert fp32 to ``dtype``, to nearest, ties to even; NaN stays NaN."""
    if interpreted() and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v != v, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def dot(a, b, acc, HALF: tl.constexpr = False):
    """Compute acc + a @ b with fp32 accumulation; fp32 operands are multiplied as fp32, not TF32.

    With HALF, fp16 operands: a @ b is summed in fp16, and that sum is added in fp32.
    """
    if HALF:
        return acc + tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    if interpreted():
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def nonfinite(v):
    """Return True where v is infinite or NaN."""
    return (v - v) != 0.0


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Compute the activation of an fp32 tensor.

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


@triton.jit
def backprop(dy, saved, ACTIVATION: tl.constexpr):
    """Compute dy * act'(saved) of fp32 tensors; saved is z, except for relu: y.

    With s the logistic function: silu' = s(z) (1 + z (1 - s(z))); gelu' = Phi(z) + z phi(z); gelu_tanh' = s + 2 z s
    (1 - s) u'(z) at s = s(2u), u = sqrt(2/pi) (z + 0.044715 z^3).
    """
    if ACTIVATION == "relu":
        return tl.where(saved <= 0.0, 0.0, dy)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(saved * 0.7071067811865476))
        return dy * (below + saved * tl.exp(-0.5 * saved * saved) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        square = saved * saved
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * saved * (1.0 + 0.044715 * square)))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return dy * (s + saved * s * (1.0 - s) * slope)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-saved))
        return dy * (s * (1.0 + saved * (1.0 - s)))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return dy
