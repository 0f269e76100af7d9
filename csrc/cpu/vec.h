// One vector type per instruction set, with the few operations that GCC's vector extensions lack.
//
// The including file defines SPU_ISA_NS (its namespace), SPU_LANES (floats per vector) and one of
// SPU_VEC_AVX512, SPU_VEC_AVX2 or neither. Everything but fma, sqrt and the fp16
// conversions is plain vector arithmetic, so that the same kernels compile for any lane count on any target: the
// AVX-512 kernels are tested on machines without it by building them with SPU_LANES 16 and no SPU_VEC_AVX512.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// Full-mask forms of the AVX-512 intrinsics are used because the plain ones warn under GCC 12.
#if defined(SPU_VEC_AVX512) || defined(SPU_VEC_AVX2)
#include <immintrin.h>
#endif

#include "math/half.h"
#include "math/hd.h"

#define SPU_INLINE static inline __attribute__((always_inline))
#define SPU_LAMBDA __attribute__((always_inline))

// Whether O::fma rounds once.
#if defined(SPU_VEC_AVX512) || defined(SPU_VEC_AVX2)
#define SPU_EXACT_FMA true
#else
#define SPU_EXACT_FMA false
#endif

namespace spu {
namespace SPU_ISA_NS {

constexpr int kLanes = SPU_LANES;
typedef float vf __attribute__((vector_size(SPU_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(SPU_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(SPU_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(SPU_LANES * 2)));
typedef int8_t vb __attribute__((vector_size(SPU_LANES)));
typedef float vf_half __attribute__((vector_size(SPU_LANES * 2)));
typedef double vd __attribute__((vector_size(SPU_LANES * 4)));

}  // namespace SPU_ISA_NS

namespace math {
template <>
struct Ops<SPU_ISA_NS::vf> {
  using vf = SPU_ISA_NS::vf;
  using UInt = SPU_ISA_NS::vu;
  using Int = SPU_ISA_NS::vi;
  SPU_HD_MEMBER vf splat(float x) { return x - vf{}; }  // x - 0: GCC turns it into one broadcast
  SPU_HD_MEMBER UInt bits(vf x) { return (UInt)x; }
  SPU_HD_MEMBER vf from_bits(UInt u) { return (vf)u; }
  SPU_HD_MEMBER vf fma(vf a, vf b, vf c) {
#if defined(SPU_VEC_AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(SPU_VEC_AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
  }
  SPU_HD_MEMBER vf sqrt(vf x) {
#if defined(SPU_VEC_AVX512)
    return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(SPU_VEC_AVX2)
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < SPU_LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
  // The minimum's second operand is the result where one is NaN.
  SPU_HD_MEMBER vf clamp(vf x, float lo, float hi) {
#if defined(SPU_VEC_AVX512)
    x = (vf)_mm512_maskz_min_ps(0xffff, (__m512)splat(hi), (__m512)x);
    return (vf)_mm512_maskz_max_ps(0xffff, (__m512)splat(lo), (__m512)x);
#elif defined(SPU_VEC_AVX2)
    return (vf)_mm256_max_ps((__m256)splat(lo), _mm256_min_ps((__m256)splat(hi), (__m256)x));
#else
    x = x > hi ? splat(hi) : x;
    return x < lo ? splat(lo) : x;
#endif
  }
#if defined(SPU_VEC_AVX512)
  SPU_HD_MEMBER vf times_power(vf p, vf t) {
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(t - round_magic()));
  }
  SPU_HD_MEMBER vf times_normal_power(vf p, vf t) { return times_power(p, t); }
  // 14 bits, and Newton's step: a division would keep one of the two units busy for 16 cycles.
  SPU_HD_MEMBER vf reciprocal(vf x) {
    const vf r = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return fma(r, fma(-x, r, splat(1.0f)), r);
  }
#else
  SPU_HD_MEMBER vf times_power(vf p, vf t) { return by_two_powers<vf>(p, t); }
  SPU_HD_MEMBER vf times_normal_power(vf p, vf t) { return p * from_bits((bits(t) - (kMagicBits - 127u)) << 23); }
  SPU_HD_MEMBER vf reciprocal(vf x) { return 1.0f / x; }
#endif
  SPU_HD_MEMBER vf of_int(Int i) { return __builtin_convertvector(i, vf); }
  SPU_HD_MEMBER Int nearest_int(vf x) {
#if defined(SPU_VEC_AVX512)
    return (Int)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(SPU_VEC_AVX2)
    return (Int)_mm256_cvtps_epi32((__m256)x);
#else
    Int n;
    for (int i = 0; i < SPU_LANES; ++i) n[i] = Ops<float>::nearest_int(x[i]);
    return n;
#endif
  }
};
}  // namespace math

namespace SPU_ISA_NS {

using O = math::Ops<vf>;

// Storage types, tagged: a 16-bit pattern does not say which format it is.
struct Fp16 {
  static constexpr bool is_fp16 = true;
  uint16_t u;
};
struct Bf16 {
  static constexpr bool is_fp16 = false;
  uint16_t u;
};

template <class V, class P>
SPU_INLINE V load_raw(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class P>
SPU_INLINE void store_raw(P* p, V v) {
  memcpy(p, &v, sizeof v);
}

// kLanes 16-bit integers, unsigned or signed, to 32-bit lanes, and the low 16 bits of each lane back. GCC 12's own
// conversion of vectors takes three to five instructions for each.
SPU_INLINE vu load_words(const uint16_t* p) {
#if defined(SPU_VEC_AVX512)
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)load_raw<vh>(p));
#elif defined(SPU_VEC_AVX2)
  return (vu)_mm256_cvtepu16_epi32((__m128i)load_raw<vh>(p));
#else
  return __builtin_convertvector(load_raw<vh>(p), vu);
#endif
}
SPU_INLINE vi load_words(const int16_t* p) {
#if defined(SPU_VEC_AVX512)
  return (vi)_mm512_maskz_cvtepi16_epi32(0xffff, (__m256i)load_raw<vh>(p));
#elif defined(SPU_VEC_AVX2)
  return (vi)_mm256_cvtepi16_epi32((__m128i)load_raw<vh>(p));
#else
  return (vi)(load_words(reinterpret_cast<const uint16_t*>(p)) << 16) >> 16;
#endif
}
template <class P>
SPU_INLINE void store_words(P* p, vu words) {
#if defined(SPU_VEC_AVX512)
  store_raw(p, (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words));
#elif defined(SPU_VEC_AVX2)
  const __m256i w = (__m256i)(words & 0xffffu);
  store_raw(p, _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  store_raw(p, __builtin_convertvector(words, vh));
#endif
}

SPU_INLINE vf load(const float* p) {
  return load_raw<vf>(p);
}
SPU_INLINE vf load(const Bf16* p) {
  return math::bf16_to_float<vf>(load_words(&p->u));
}
SPU_INLINE vf load(const Fp16* p) {
#if defined(SPU_VEC_AVX512)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_raw<vh>(p));
#elif defined(SPU_VEC_AVX2)
  return (vf)_mm256_cvtph_ps((__m128i)load_raw<vh>(p));
#else
  return math::fp16_to_float<vf>(__builtin_convertvector(load_raw<vh>(p), vu));
#endif
}

SPU_INLINE void store(float* p, vf v) {
  store_raw(p, v);
}
SPU_INLINE void store(Bf16* p, vf v) {
#if defined(SPU_BF16_CONVERT)
  // A denormal becomes zero, as it does in the tiles whose sums are stored so.
  store_raw(p, (vh)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v));
#else
  store_words(&p->u, math::float_to_bf16<vf>(v));
#endif
}
SPU_INLINE void store(Fp16* p, vf v) {
#if defined(SPU_VEC_AVX512)
  store_raw(p, (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));  // 0: round to nearest even
#elif defined(SPU_VEC_AVX2)
  store_raw(p, (vh)_mm256_cvtps_ph((__m256)v, 0));
#else
  store_raw(p, __builtin_convertvector(math::float_to_fp16<vf>(v), vh));
#endif
}

// Two vectors that follow each other: 16-bit ones of AVX-512 as one line of the cache, which halves a block's stores.
template <class T>
SPU_INLINE void store_pair(T* p, vf a, vf b) {
  store(p, a), store(p + kLanes, b);
}
#if defined(SPU_VEC_AVX512)
SPU_INLINE void store_pair(Fp16* p, vf a, vf b) {
  const __m256i low = _mm512_maskz_cvtps_ph(0xffff, (__m512)a, 0), high = _mm512_maskz_cvtps_ph(0xffff, (__m512)b, 0);
  store_raw(p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
#endif
#if defined(SPU_BF16_CONVERT)
SPU_INLINE void store_pair(Bf16* p, vf a, vf b) {
  store_raw(p, _mm512_maskz_cvtne2ps_pbh(~0u, (__m512)b, (__m512)a));
}
#endif

// v as it comes back from storage.
template <class T>
SPU_INLINE vf rounded_to(vf v) {
  T stored[kLanes];
  store(stored, v);
  return load(stored);
}

// The first n <= kLanes elements only; the other lanes are zero. GCC 12 loses n's bound when it threads jumps.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Warray-bounds"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif
template <class T>
SPU_INLINE vf load_some(const T* p, int64_t n) {
  T tmp[kLanes];
  memset(tmp, 0, sizeof tmp);
  memcpy(tmp, p, sizeof(T) * static_cast<size_t>(n));
  return load(tmp);
}

template <class T>
SPU_INLINE void store_some(T* p, vf v, int64_t n) {
  T tmp[kLanes];
  store(tmp, v);
  memcpy(p, tmp, sizeof(T) * static_cast<size_t>(n));
}

#pragma GCC diagnostic pop

SPU_INLINE vu max_u(vu a, vu b) {
  return a > b ? a : b;
}
SPU_INLINE vu min_u(vu a, vu b) {
  return a < b ? a : b;
}
// The lane numbers 0, 1, ... as template arguments, for constant shuffles.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};

// Lanes of a and b, numbered through: the result has lane Index[i] at i. GCC knows the portable form from 12 on.
template <class V, int... Index>
SPU_INLINE V shuffled(V a, V b, Lanes<Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index...);
#else
  const vi order = {Index...};
  return __builtin_shuffle(a, b, order);
#endif
}

// The lanes of v rotated by D.
template <int D, int... I>
SPU_INLINE vu rotated(vu v, Lanes<I...>) {
  return shuffled(v, v, Lanes<(I + D) % kLanes...>{});
}
template <int D = kLanes / 2>
SPU_INLINE uint32_t max_lane(vu v) {
  v = max_u(v, rotated<D>(v, typename MakeLanes<kLanes>::type{}));
  if constexpr (D > 1) {
    return max_lane<D / 2>(v);
  } else {
    return v[0];
  }
}

// Lanes are added in pairs, which rounds less than a chain.
SPU_INLINE float sum_of(vf v) {
  float x[kLanes];
  store(x, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
SPU_INLINE bool any(vi mask) {
#if defined(SPU_VEC_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r |= mask[i];
  return r != 0;
#endif
}

SPU_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
SPU_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// c + a b for the same a in every lane, read from memory by the multiply-add itself where an instruction can: one slot
// at issue instead of two, and one load for each use.
SPU_INLINE vf fma_at(const float* a, vf b, vf c) {
#if defined(SPU_VEC_AVX512)
  __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
#else
  return O::fma(O::splat(*a), b, c);
#endif
}

// c + a0 b0 + a1 b1 for lanes that hold two bf16 values each.
SPU_INLINE vf dot_bf16(vf a, vf b, vf c) {
#if defined(SPU_BF16_DOT) && defined(SPU_VEC_AVX512)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  const vf high = O::fma(O::from_bits(O::bits(a) & 0xffff0000u), O::from_bits(O::bits(b) & 0xffff0000u), c);
  return O::fma(O::from_bits(O::bits(a) << 16), O::from_bits(O::bits(b) << 16), high);
#endif
}

}  // namespace SPU_ISA_NS
}  // namespace spu
