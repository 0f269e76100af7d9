// One AdamW step on one element: decoupled weight decay (Loshchilov and Hutter), torch.optim.AdamW's sequence.
#pragma once

#include <math.h>

#include "math/hd.h"

namespace spu::math {

// The constants of a step, computed once in fp64 from the 1-based step number.
struct AdamWStep {
  float decay;         // 1 - lr * weight_decay
  float one_minus_b1;  // 1 - beta1
  float b2, one_minus_b2;
  float step_size;   // lr / (1 - beta1^step)
  float bias2_sqrt;  // sqrt(1 - beta2^step)
  float eps;
};

SPU_HD AdamWStep adamw_constants(double step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  AdamWStep k;
  k.decay = static_cast<float>(1.0 - lr * weight_decay);
  k.one_minus_b1 = static_cast<float>(1.0 - beta1);
  k.b2 = static_cast<float>(beta2);
  k.one_minus_b2 = static_cast<float>(1.0 - beta2);
  k.step_size = static_cast<float>(lr / (1.0 - ::pow(beta1, step)));
  k.bias2_sqrt = static_cast<float>(::sqrt(1.0 - ::pow(beta2, step)));
  k.eps = static_cast<float>(eps);
  return k;
}

template <class F>
struct AdamWState {
  F param, m, v;
};

// The master; or the 16-bit weight, where it differs from the rounded master because somebody has changed it.
template <class F>
SPU_HD F following(F master, F rounded, F weight) {
  return weight == rounded ? master : weight;
}

// The moments' half of a step; g is the true-scale gradient, already clipped.
template <class F>
SPU_HD AdamWState<F> adamw_moments(AdamWState<F> s, F g, const AdamWStep& k) {
  using O = Ops<F>;
  return {s.param, O::fma(O::splat(k.one_minus_b1), g - s.m, s.m), O::fma(g * k.one_minus_b2, g, s.v * k.b2)};
}

// The parameter's half; root is sqrt(v) / bias2_sqrt.
template <class F>
SPU_HD F adamw_param(AdamWState<F> s, F root, const AdamWStep& k) {
  return s.param * k.decay - (s.m * k.step_size) / (root + k.eps);
}

template <class F>
SPU_HD AdamWState<F> adamw_step(AdamWState<F> s, F g, const AdamWStep& k) {
  s = adamw_moments<F>(s, g, k);
  s.param = adamw_param<F>(s, Ops<F>::sqrt(s.v) / k.bias2_sqrt, k);
  return s;
}

}  // namespace spu::math
