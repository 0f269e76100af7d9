// SPU_HD marks arithmetic that is compiled for the host and, under nvcc, for the device too.
//
// On the host it is `static` and always inlined: these headers are included by translation units compiled for
// different instruction sets, and a shared inline function would let the linker keep the AVX-512 copy for every
// caller. Internal linkage makes that impossible.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SPU_HD static __host__ __device__ __forceinline__
#define SPU_HD_MEMBER static __host__ __device__ __forceinline__
#else
#define SPU_HD static inline __attribute__((always_inline))
#define SPU_HD_MEMBER static inline __attribute__((always_inline))
#endif

namespace spu::math {

// Rounds |x| < 2^22 to the nearest integer, ties to even, with the addition 1.5 * 2^23 (needs the default rounding
// mode and no -ffast-math). The low bits of the sum's pattern are the integer in two's complement.
SPU_HD float round_magic() {
  return 12582912.0f;
}
// round_magic's pattern: the difference of two sums' patterns is that of their integers.
constexpr uint32_t kMagicBits = 0x4b400000u;

// The primitive operations of a value type F. Formulas in this folder are templates over F, written once with
// operators, ternaries and Ops<F>; F is float here and a GCC vector of floats in csrc/cpu/vec.h (where a ternary
// on a comparison selects lane by lane).
template <class F>
struct Ops;

// p 2^n with t = n + round_magic(), rounded once, by two factors: n = 128 and subnormal results need no special case.
template <class F>
SPU_HD F by_two_powers(F p, F t) {
  using O = Ops<F>;
  const typename O::UInt n = O::bits(t) - kMagicBits;
  const typename O::UInt half = ((n + 1024u) >> 1) - 512u;  // floor(n / 2) with a logical shift
  return p * O::from_bits((half + 127u) << 23) * O::from_bits((n - half + 127u) << 23);
}

template <>
struct Ops<float> {
  using Int = int32_t;
  using UInt = uint32_t;

  SPU_HD_MEMBER float splat(float x) { return x; }
  SPU_HD_MEMBER UInt bits(float x) {
    UInt u;
    memcpy(&u, &x, sizeof u);
    return u;
  }
  SPU_HD_MEMBER float from_bits(UInt u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
  // a * b + c. Fused where the target has the instruction; the bounds of the tests hold either way.
  SPU_HD_MEMBER float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
  SPU_HD_MEMBER float sqrt(float x) { return __builtin_sqrtf(x); }
  // x within [lo, hi]; NaN passes.
  SPU_HD_MEMBER float clamp(float x, float lo, float hi) {
    x = x > hi ? hi : x;
    return x < lo ? lo : x;
  }
  // p 2^n for -252 <= n <= 254, t = n + round_magic(); and for powers 2^n that are normal values.
  SPU_HD_MEMBER float times_power(float p, float t) { return by_two_powers<float>(p, t); }
  SPU_HD_MEMBER float times_normal_power(float p, float t) {
    return p * from_bits((bits(t) - (kMagicBits - 127u)) << 23);
  }
  // 1 / x for 1 <= x < 2^127, within an ulp.
  SPU_HD_MEMBER float reciprocal(float x) { return 1.0f / x; }
  SPU_HD_MEMBER float of_int(Int i) { return static_cast<float>(i); }
  // Ties to even; any integer where |x| > 2^30.
  SPU_HD_MEMBER Int nearest_int(float x) {
    return x <= 0x1p30f && x >= -0x1p30f ? static_cast<Int>(__builtin_rintf(x)) : 0;
  }
};

template <class F>
SPU_HD F abs(F x) {
  using O = Ops<F>;
  return O::from_bits(O::bits(x) & 0x7fffffffu);
}

// True (or an all-ones lane) where x is infinite or NaN.
template <class F>
SPU_HD auto is_nonfinite(F x) -> decltype(x == x) {
  return !(abs(x) <= 3.402823466e+38f);
}

}  // namespace spu::math
