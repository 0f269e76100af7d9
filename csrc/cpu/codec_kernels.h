// Conversions and block-wise int8. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec_codes.h"
#include "math/codec.h"

namespace spu::SPU_ISA_NS {

template <class From, class To>
static void convert_range(const From* src, To* dst, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(dst + i, load(src + i));
  if (i < end) store_some(dst + i, load_some(src + i, end - i), end - i);
}

template <class From>
static void convert_from(const void* src, Type to, void* dst, int64_t begin, int64_t end) {
  const From* s = static_cast<const From*>(src);
  if (to == Type::fp16) return convert_range(s, static_cast<Fp16*>(dst), begin, end);
  if (to == Type::bf16) return convert_range(s, static_cast<Bf16*>(dst), begin, end);
  return convert_range(s, static_cast<float*>(dst), begin, end);
}

static void convert(Type from, const void* src, Type to, void* dst, int64_t begin, int64_t end) {
  if (from == Type::fp16) return convert_from<Fp16>(src, to, dst, begin, end);
  if (from == Type::bf16) return convert_from<Bf16>(src, to, dst, begin, end);
  return convert_from<float>(src, to, dst, begin, end);
}

constexpr int kBlock = math::kInt8Block, kBlockVectors = kBlock / kLanes;

// x / scale as the division rounds it, from inv = 1 / scale: one correction of the quotient by its remainder
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990) in 3 instructions
// where a vector division waits for 5 cycles and more. Not for remainders that may be subnormal.
SPU_INLINE vf quotient(vf x, vf scale, vf inv) {
  const vf q = x * inv;
  const vf corrected = O::fma(O::fma(-q, scale, x), inv, q);
  return O::from_bits(O::bits(corrected) | (O::bits(x) & 0x80000000u));  // the correction loses the sign of -0
}
constexpr float kLeastExactScale = 1e-28f;

// The largest magnitude of a block, over bit patterns: as unsigned integers they order like the magnitudes, with
// infinity and then NaN on top, so that a comparison cannot lose a NaN.
template <int N>
SPU_INLINE float block_absmax(const vf (&v)[N]) {
  vu top = {};
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) top = max_u(top, O::bits(v[i]) & 0x7fffffffu);
  return math::Ops<float>::from_bits(max_lane(top));
}

// v /= scale
template <int N>
SPU_INLINE void divide_block(vf (&v)[N], float scale) {
  const vf s = O::splat(scale), inv = O::splat(1.0f / scale);
  if (SPU_EXACT_FMA && scale >= kLeastExactScale) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = quotient(v[i], s, inv);
  } else {
    for (int i = 0; i < N; ++i) v[i] = v[i] / s;
  }
}

template <class T>
SPU_INLINE float encode_block(const T* x, int8_t* codes) {
  vf v[kBlockVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kBlockVectors; ++i) v[i] = load(x + i * kLanes);
  const float scale = math::int8_scale(block_absmax(v));
  if (!math::int8_scale_codes(scale)) {
    memset(codes, 0, kBlock);
    return scale;
  }
  divide_block(v, scale);  // the largest quotient is within rounding of 127: no bound is needed
#pragma GCC unroll 4
  for (int i = 0; i < kBlockVectors; i += 4) store_rounded(codes + i * kLanes, v + i);
  return scale;
}

template <class T>
static void encode_typed(const void* data, int64_t numel, float* scales, int8_t* codes, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(data);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * kBlock, n = numel - at;
    if (n >= kBlock) {
      scales[b] = encode_block(x + at, codes + at);
    } else {
      T tmp[kBlock];
      int8_t out[kBlock];
      memset(tmp, 0, sizeof tmp);
      memcpy(tmp, x + at, sizeof(T) * static_cast<size_t>(n));
      scales[b] = encode_block(tmp, out);
      memcpy(codes + at, out, static_cast<size_t>(n));
    }
  }
}

template <class T>
SPU_INLINE void decode_block(T* x, float scale, const int8_t* codes) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlockVectors; ++i) {
    const vi q = load_codes(codes + i * kLanes);
    store(x + i * kLanes, math::int8_value<vf>(__builtin_convertvector(q, vf), O::splat(scale)));
  }
}

template <class T>
static void decode_typed(void* data, int64_t numel, const float* scales, const int8_t* codes, int64_t begin,
                         int64_t end) {
  T* x = static_cast<T*>(data);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * kBlock, n = numel - at;
    if (n >= kBlock) {
      decode_block(x + at, scales[b], codes + at);
    } else {
      T out[kBlock];
      int8_t tmp[kBlock] = {};
      memcpy(tmp, codes + at, static_cast<size_t>(n));
      decode_block(out, scales[b], tmp);
      memcpy(x + at, out, sizeof(T) * static_cast<size_t>(n));
    }
  }
}

static void int8_encode(Type type, const void* x, int64_t numel, float* scales, int8_t* codes, int64_t begin,
                        int64_t end) {
  if (type == Type::fp16) return encode_typed<Fp16>(x, numel, scales, codes, begin, end);
  if (type == Type::bf16) return encode_typed<Bf16>(x, numel, scales, codes, begin, end);
  return encode_typed<float>(x, numel, scales, codes, begin, end);
}

static void int8_decode(Type type, void* x, int64_t numel, const float* scales, const int8_t* codes, int64_t begin,
                        int64_t end) {
  if (type == Type::fp16) return decode_typed<Fp16>(x, numel, scales, codes, begin, end);
  if (type == Type::bf16) return decode_typed<Bf16>(x, numel, scales, codes, begin, end);
  return decode_typed<float>(x, numel, scales, codes, begin, end);
}

}  // namespace spu::SPU_ISA_NS
