// Activations and their derivatives in fp32. Formulas: torch.nn.functional.{relu,gelu,silu}.
#pragma once

#include "math/elementary.h"

namespace spu::math {

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

// logistic(x) and logistic(-x) for |x| <= 87, both with a small relative error: 1 - logistic(x) would cancel.
template <class F>
struct Logistic {
  F up, down;
};

template <class F>
SPU_HD Logistic<F> logistic_pair(F x) {
  const F e = exp_normal<F>(-x);
  const F s = Ops<F>::reciprocal(1.0f + e);
  return {s, e * s};
}

// With s = logistic(2u): s + z s (1 - s) 2u'. Beyond |z| = 10 that is 0 or 1 to the last bit; the clamp keeps the
// exponential finite. z - z is 0, or NaN for an infinite z, whose derivative is NaN in torch.
template <class F>
SPU_HD F gelu_tanh_grad(F z) {
  using O = Ops<F>;
  const F c = Ops<F>::clamp(z, -10.0f, 10.0f);
  const Logistic<F> s = logistic_pair<F>(gelu_tanh_2u<F>(c));
  const F du = O::fma(c * c, O::splat(3.0f * 0.07135481283f), O::splat(1.595769122f));
  return O::fma(c * s.up * s.down, du, s.up) + (z - z);
}

template <class F>
SPU_HD F silu(F z) {
  return z * logistic<F>(z);
}

// s (1 + z (1 - s)), s = logistic(z)
template <class F>
SPU_HD F silu_grad(F z) {
  const F c = Ops<F>::clamp(z, -87.0f, 87.0f);
  const Logistic<F> s = logistic_pair<F>(c);
  return s.up * Ops<F>::fma(c, s.down, Ops<F>::splat(1.0f)) + (z - z);
}

template <Act A, class F>
SPU_HD F activate(F z) {
  if constexpr (A == Act::relu) return relu<F>(z);
  if constexpr (A == Act::gelu) return gelu<F>(z);
  if constexpr (A == Act::gelu_tanh) return gelu_tanh<F>(z);
  if constexpr (A == Act::silu) return silu<F>(z);
  return z;
}

// dy * act'(saved): saved is the pre-activation, or the output for relu. Where relu was flat the result is 0 whatever
// dy is (0 * inf would be NaN), and a NaN output passes dy on: torch's threshold_backward.
template <Act A, class F>
SPU_HD F activate_backward(F dy, F saved) {
  if constexpr (A == Act::relu) return saved <= 0.0f ? Ops<F>::splat(0.0f) : dy;
  if constexpr (A == Act::gelu) return dy * gelu_grad<F>(saved);
  if constexpr (A == Act::gelu_tanh) return dy * gelu_tanh_grad<F>(saved);
  if constexpr (A == Act::silu) return dy * silu_grad<F>(saved);
  return dy;
}

}  // namespace spu::math
