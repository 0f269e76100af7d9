// Conversions and block-wise int8. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "math/codec.h"

namespace spu {
namespace SPU_ISA_NS {

template <class From, class To>
static void convert_range(const From* src, To* dst, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(dst + i, load(src + i));
  if (i < end) store_some(dst + i, load_some(src + i, end - i), end - i);
}

template <class From>
static void convert_from(const void* src, cpu::Type to, void* dst, int64_t begin, int64_t end) {
  const From* s = static_cast<const From*>(src);
  if (to == cpu::Type::fp16) return convert_range(s, static_cast<Fp16*>(dst), begin, end);
  if (to == cpu::Type::bf16) return convert_range(s, static_cast<Bf16*>(dst), begin, end);
  return convert_range(s, static_cast<float*>(dst), begin, end);
}

static void convert(cpu::Type from, const void* src, cpu::Type to, void* dst, int64_t begin, int64_t end) {
  if (from == cpu::Type::fp16) return convert_from<Fp16>(src, to, dst, begin, end);
  if (from == cpu::Type::bf16) return convert_from<Bf16>(src, to, dst, begin, end);
  return convert_from<float>(src, to, dst, begin, end);
}

constexpr int kBlock = math::kInt8Block, kBlockVectors = kBlock / kLanes;

// One whole block. The largest magnitude is taken over bit patterns: as unsigned integers they order like the
// magnitudes, with infinity and then NaN on top, so that a comparison cannot lose a NaN.
template <class T>
SPU_INLINE float encode_block(const T* x, int8_t* codes) {
  vf v[kBlockVectors];
  vu top = {};
#pragma GCC unroll 16
  for (int i = 0; i < kBlockVectors; ++i) {
    v[i] = load(x + i * kLanes);
    top = max_u(top, O::bits(v[i]) & 0x7fffffffu);
  }
  const float scale = math::int8_scale(math::Ops<float>::from_bits(max_lane(top)));
  if (!math::int8_scale_codes(scale)) {
    memset(codes, 0, kBlock);
    return scale;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kBlockVectors; ++i) {
    const vf q = math::int8_code<vf>(v[i], O::splat(scale));
    store_codes(codes + i * kLanes, __builtin_convertvector(q, vi));
  }
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

static void int8_encode(cpu::Type type, const void* x, int64_t numel, float* scales, int8_t* codes, int64_t begin,
                        int64_t end) {
  if (type == cpu::Type::fp16) return encode_typed<Fp16>(x, numel, scales, codes, begin, end);
  if (type == cpu::Type::bf16) return encode_typed<Bf16>(x, numel, scales, codes, begin, end);
  return encode_typed<float>(x, numel, scales, codes, begin, end);
}

static void int8_decode(cpu::Type type, void* x, int64_t numel, const float* scales, const int8_t* codes, int64_t begin,
                        int64_t end) {
  if (type == cpu::Type::fp16) return decode_typed<Fp16>(x, numel, scales, codes, begin, end);
  if (type == cpu::Type::bf16) return decode_typed<Bf16>(x, numel, scales, codes, begin, end);
  return decode_typed<float>(x, numel, scales, codes, begin, end);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
