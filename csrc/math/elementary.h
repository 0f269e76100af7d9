// exp, logistic function and the normal distribution in fp32, branch-free, for scalars and vectors.
#pragma once

#include "math/hd.h"

namespace spu::math {

// e^x = p 2^n. t = n + round_magic() holds n in its low bits, also where it is negative; NaN gives NaN for p.
template <class F>
struct Exponential {
  F p, t;
};

// x = n ln2 + r with |r| <= ln2 / 2 (Cody and Waite's two-part ln2); Taylor-like minimax polynomial in r.
template <class F>
SPU_HD Exponential<F> exp_parts(F x) {
  using O = Ops<F>;
  const F t = O::fma(x, O::splat(1.44269504f), O::splat(round_magic()));
  const F n = t - round_magic();
  F r = O::fma(n, O::splat(-0.693359375f), x);
  r = O::fma(n, O::splat(2.12194440e-4f), r);
  // Pairs of terms, then pairs of pairs (Estrin): three additions deep where Horner's scheme has six.
  const F r2 = r * r;
  const F p67 = O::fma(r, O::splat(1.0f / 5040.0f), O::splat(1.0f / 720.0f));
  const F p45 = O::fma(r, O::splat(1.0f / 120.0f), O::splat(1.0f / 24.0f));
  const F p23 = O::fma(r, O::splat(1.0f / 6.0f), O::splat(0.5f));
  const F high = O::fma(r2, p67, p45);
  return {O::fma(O::fma(r2, high, p23), r2, r) + 1.0f, t};
}

// e^x, about 1.5 ulp over the whole range: subnormal results, 0 and inf at the ends, NaN in NaN out.
template <class F>
SPU_HD F exp(F x) {
  using O = Ops<F>;
  const Exponential<F> e = exp_parts<F>(O::clamp(x, -104.0f, 89.0f));
  return O::times_power(e.p, e.t);
}

// The same for -87 <= x <= 88, where 2^n is one normal factor.
template <class F>
SPU_HD F exp_normal(F x) {
  const Exponential<F> e = exp_parts<F>(x);
  return Ops<F>::times_normal_power(e.p, e.t);
}

// e^x for x <= 88, and 0 below -87, where it is no normal value: a processor takes 150 cycles and more to make one that
// is not, whatever the other lanes of its vector are.
template <class F>
SPU_HD F exp_or_zero(F x) {
  using O = Ops<F>;
  const F e = exp_normal<F>(O::clamp(x, -87.0f, 88.0f));
  return x < -87.0f ? O::splat(0.0f) : e;
}

// 1 / (1 + e^-x). Beyond 87 that is 1 to the last bit; below -88 it is 0 here, as where e^-x overflows.
template <class F>
SPU_HD F logistic(F x) {
  using O = Ops<F>;
  const F s = O::reciprocal(1.0f + exp_normal<F>(-O::clamp(x, -88.0f, 87.0f)));
  return x < -88.0f ? O::splat(0.0f) : s;
}

// The standard normal distribution function Phi(x) and its density phi(x), sharing one exponential.
//
// Phi(-a) = e^(-a^2/2) s P(s), s = 1 / (1 + 0.35 a), a >= 0: the form of Abramowitz and Stegun 7.1.26, refitted
// (degree 8, relative error 3.2e-8 on 0 <= a <= 14) so that the *relative* error of both tails is small; a
// formula 0.5 (1 + erf) loses all digits of the negative one.
template <class F>
struct Normal {
  F cdf, pdf;
};

template <class F>
SPU_HD Normal<F> normal(F x) {
  using O = Ops<F>;
  const F a = abs(x);
  const F e = exp<F>(x * x * -0.5f);
  const F s = 1.0f / O::fma(a, O::splat(0.35f), O::splat(1.0f));
  const F s2 = s * s, s4 = s2 * s2;
  const F p01 = O::fma(s, O::splat(0.13986191153526306f), O::splat(0.13962140679359436f));
  const F p23 = O::fma(s, O::splat(0.10550934076309204f), O::splat(0.11983255296945572f));
  const F p45 = O::fma(s, O::splat(0.15917932987213135f), O::splat(-0.023113206028938293f));
  const F p67 = O::fma(s, O::splat(0.14397406578063965f), O::splat(-0.25571897625923157f));
  const F low = O::fma(s2, p23, p01), high = O::fma(s2, p67, p45);
  const F p = O::fma(s4, O::fma(s4, O::splat(-0.029146432876586914f), high), low);
  const F tail = e * (s * p);
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.3989422804014327f};
}

}  // namespace spu::math
