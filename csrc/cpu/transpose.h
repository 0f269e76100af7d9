// Transposition in registers. Included in the namespace of an instruction set.
#pragma once

#include "cpu/vec.h"

// Eight rows of 16-bit values are transposed in 32-byte registers where those have in-lane shuffles.
#if defined(SPU_VEC_AVX512) || defined(SPU_VEC_AVX2)
#define SPU_SHUFFLE_HALVES
#endif

namespace spu::SPU_ISA_NS {

// A kLanes x kLanes block: at distance d = kLanes/2 ... 1 rows i and i + d exchange the off-diagonal d x d blocks.
// log2(kLanes) rounds of two-input shuffles.
template <int D, int... I>
SPU_INLINE void exchange(vf& a, vf& b, Lanes<I...>) {
  const vf x = a, y = b;
  a = shuffled(x, y, Lanes<((I & D) ? kLanes + I - D : I)...>{});
  b = shuffled(x, y, Lanes<((I & D) ? kLanes + I : I + D)...>{});
}

template <int D>
SPU_INLINE void transpose_round(vf (&r)[kLanes]) {
  using All = typename MakeLanes<kLanes>::type;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & D) == 0) exchange<D>(r[i], r[i + D], All{});
  }
  if constexpr (D > 1) transpose_round<D / 2>(r);
}

SPU_INLINE void transpose(vf (&r)[kLanes]) {
  transpose_round<kLanes / 2>(r);
}

#if defined(SPU_SHUFFLE_HALVES)
typedef uint16_t vh16 __attribute__((vector_size(32)));

// Eight 16-bit values from a, eight from b (zeros if null).
template <class T>
SPU_INLINE vh16 join_halves(const T* a, const T* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  if (!b) return (vh16)_mm256_inserti128_si256(_mm256_setzero_si256(), low, 0);
  return (vh16)_mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
}

// Two 8 x 8 blocks, one in each half of the registers.
SPU_INLINE void transpose_halves(vh16 (&r)[8]) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);  // rows 2i, 2i+1; columns 0-3
    a[2 * i + 1] = _mm256_unpackhi_epi16((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // rows 4i .. 4i+3; columns 4j, 4j+1 and 4j+2, 4j+3
      b[4 * i + 2 * j] = _mm256_unpacklo_epi32(a[4 * i + j], a[4 * i + j + 2]);
      b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi32(a[4 * i + j], a[4 * i + j + 2]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[2 * j] = (vh16)_mm256_unpacklo_epi64(b[j], b[j + 4]);
    r[2 * j + 1] = (vh16)_mm256_unpackhi_epi64(b[j], b[j + 4]);
  }
}

// 8 of the 16 values in fp32.
template <class T, int Half>
SPU_INLINE __m256 widen_eight(vh16 v) {
  const __m128i h = _mm256_extracti128_si256((__m256i)v, Half);
  if constexpr (T::is_fp16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// 16 values widened to fp32.
template <class T>
SPU_INLINE void store_widened(float* p, vh16 v) {
#if defined(SPU_VEC_AVX512)
  T values[16];
  memcpy(values, &v, sizeof v);
  store(p, load(values));
#else
  _mm256_storeu_ps(p, widen_eight<T, 0>(v));
  _mm256_storeu_ps(p + 8, widen_eight<T, 1>(v));
#endif
}
#endif

}  // namespace spu::SPU_ISA_NS
