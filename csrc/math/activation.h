// Activations and their derivatives in fp32. Formulas: torch.nn.functional.{relu,gelu,silu}.
#pragma once

#include "math/elementary.h"

namespace spu {
namespace math {

enum class Act : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

template <class F>
SPU_HD F relu(F z) {
  return z < 0.0f ? Ops<F>::splat(0.0f) : z;  // NaN stays NaN, as torch's
}

// z Phi(z)
template <class F>
SPU_HD F gelu(F z) {
  return z * normal<F>(z).cdf;
}

template <class F>
SPU_HD F gelu_grad(F z) {
  const Normal<F> n = normal<F>(z);
  return Ops<F>::fma(z, n.pdf, n.cdf);
}

// 0.5 z (1 + tanh u), u = sqrt(2/pi) (z + 0.044715 z^3), written as z logistic(2u): no cancellation for z < 0.
template <class F>
SPU_HD F gelu_tanh_2u(F z) {
  return z * Ops<F>::fma(z * z, Ops<F>::splat(0.07135481283f), Ops<F>::splat(1.595769122f));
}

template <class F>
SPU_HD F gelu_tanh(F z) {
  return z * logistic<F>(gelu_tanh_2u<F>(z));
}

// With s = logistic(2u): s + z s (1 - s) 2u'
template <class F>
SPU_HD F gelu_tanh_grad(F z) {
  using O = Ops<F>;
  // Beyond |z| = 20 the derivative is 0 or 1 to the last bit; the clamp keeps inf * 0 out.
  const F top = O::splat(20.0f);
  F c = z > top ? top : z;
  c = c < -top ? -top : c;
  const F s = logistic<F>(gelu_tanh_2u<F>(c));
  const F du = O::fma(c * c, O::splat(3.0f * 0.07135481283f), O::splat(1.595769122f));
  return O::fma(c * s * (1.0f - s), du, s);
}

template <class F>
SPU_HD F silu(F z) {
  return z * logistic<F>(z);
}

// s (1 + z (1 - s))
template <class F>
SPU_HD F silu_grad(F z) {
  const F s = logistic<F>(z);
  return s * Ops<F>::fma(z, 1.0f - s, Ops<F>::splat(1.0f));
}

// Derivative of relu from its *output* y: 1 where y > 0. NaN outputs give 0 times dy as torch's threshold_backward.
template <class F>
SPU_HD F relu_grad_from_output(F y) {
  return y > 0.0f ? Ops<F>::splat(1.0f) : Ops<F>::splat(0.0f);
}

template <Act A, class F>
SPU_HD F activate(F z) {
  if constexpr (A == Act::relu) return relu<F>(z);
  if constexpr (A == Act::gelu) return gelu<F>(z);
  if constexpr (A == Act::gelu_tanh) return gelu_tanh<F>(z);
  if constexpr (A == Act::silu) return silu<F>(z);
  return z;
}

// act'(saved): saved is the pre-activation, or the output for relu.
template <Act A, class F>
SPU_HD F activate_grad(F saved) {
  if constexpr (A == Act::relu) return relu_grad_from_output<F>(saved);
  if constexpr (A == Act::gelu) return gelu_grad<F>(saved);
  if constexpr (A == Act::gelu_tanh) return gelu_tanh_grad<F>(saved);
  if constexpr (A == Act::silu) return silu_grad<F>(saved);
  return Ops<F>::splat(1.0f);
}

}  // namespace math
}  // namespace spu
