// Vectors of codes: int8, bytes and what codecs ask of them. Included in the namespace of an instruction set.
#pragma once

#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// kLanes int8 codes to and from 32-bit lanes. GCC 12 converts such short byte vectors element by element.
SPU_INLINE vi load_codes(const int8_t* p) {
#if defined(SPU_VEC_AVX512)
  return (vi)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)load_raw<vb>(p));
#elif defined(SPU_VEC_AVX2)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(load_raw<vb>(p), vi);
#endif
}
SPU_INLINE void store_codes(int8_t* p, vi codes) {
#if defined(SPU_VEC_AVX512)
  store_raw(p, (vb)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)codes));
#elif defined(SPU_VEC_AVX2)
  const __m256i c = (__m256i)codes;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  store_raw(p, __builtin_convertvector(codes, vb));
#endif
}

// The same for unsigned bytes.
SPU_INLINE vu load_bytes(const uint8_t* p) {
#if defined(SPU_VEC_AVX512)
  return (vu)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)load_raw<vb>(p));
#elif defined(SPU_VEC_AVX2)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return (vu) __builtin_convertvector(load_raw<vb>(p), vi) & 0xffu;
#endif
}
SPU_INLINE void store_bytes(uint8_t* p, vu codes) {
#if defined(SPU_VEC_AVX2)
  const __m256i c = (__m256i)codes;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  store_codes(reinterpret_cast<int8_t*>(p), (vi)codes);
#endif
}

// A block's 64 bytes from the low bits of 64 / kLanes vectors of codes below 256.
SPU_INLINE void store_64_bytes(uint8_t* p, const vu* codes) {
#if defined(SPU_VEC_AVX512)
  const __m512i ab = _mm512_maskz_packus_epi32(~0u, (__m512i)codes[0], (__m512i)codes[1]);
  const __m512i cd = _mm512_maskz_packus_epi32(~0u, (__m512i)codes[2], (__m512i)codes[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  store_raw(p, _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_maskz_packus_epi16(~uint64_t{0}, ab, cd)));
#elif defined(SPU_VEC_AVX2)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work in halves of a register
  for (int i = 0; i < 8; i += 4) {
    const __m256i ab = _mm256_packus_epi32((__m256i)codes[i], (__m256i)codes[i + 1]);
    const __m256i cd = _mm256_packus_epi32((__m256i)codes[i + 2], (__m256i)codes[i + 3]);
    store_raw(p + i * kLanes, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order));
  }
#else
  for (int i = 0; i < 64 / kLanes; ++i) store_bytes(p + i * kLanes, codes[i]);
#endif
}

// True if one of 64 bytes has none of mask's bits.
SPU_INLINE bool any_byte_without(uint8_t mask, const uint8_t* p) {
#if defined(SPU_VEC_AVX512)
  const __m512i bits = _mm512_set1_epi8(static_cast<char>(mask));
  return _mm512_testn_epi8_mask(load_raw<__m512i>(p), bits) != 0;
#elif defined(SPU_VEC_AVX2)
  const __m256i bits = _mm256_set1_epi8(static_cast<char>(mask));
  const __m256i least =
      _mm256_min_epu8(_mm256_and_si256(load_raw<__m256i>(p), bits), _mm256_and_si256(load_raw<__m256i>(p + 32), bits));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) != 0;
#else
  bool found = false;
  for (int i = 0; i < 64; ++i) found |= (p[i] & mask) == 0;
  return found;
#endif
}

// True if a lane of a is at least limit.
SPU_INLINE bool any_from(vu a, uint32_t limit) {
#if defined(SPU_VEC_AVX512)
  return _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
#elif defined(SPU_VEC_AVX2)
  const __m256i l = _mm256_set1_epi32(static_cast<int>(limit));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)a, l), (__m256i)a)) != 0;
#else
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= a[i] >= limit;
  return found;
#endif
}

// 4 kLanes values in [-127.5, 127.5] rounded to the nearest int8, ties to even.
SPU_INLINE void store_rounded(int8_t* p, const vf* v) {
#if defined(SPU_VEC_AVX512)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store_codes(p + i * kLanes, (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v[i]));
#elif defined(SPU_VEC_AVX2)
  const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[0]), _mm256_cvtps_epi32((__m256)v[1]));
  const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[2]), _mm256_cvtps_epi32((__m256)v[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work in halves of a register
  store_raw(p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
#else
  for (int i = 0; i < 4; ++i) {
    store_codes(p + i * kLanes, __builtin_convertvector((v[i] + math::round_magic()) - math::round_magic(), vi));
  }
#endif
}

}  // namespace spu::SPU_ISA_NS
