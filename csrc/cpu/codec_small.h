// Block-wise int4 and fp8, one value at a time. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "math/codec.h"

namespace spu {
namespace SPU_ISA_NS {

// A format codes one value under a scale: code() gives 8 or 4 bits, value() the number they stand for.
struct Int4 {
  static constexpr int kBlock = math::kInt4Block;
  static constexpr float kLargest = math::kInt4Largest;
  SPU_HD_MEMBER uint8_t code(float x, float scale) {
    return static_cast<uint8_t>(static_cast<int>(math::int4_code<float>(x, scale)) & 15);
  }
  SPU_HD_MEMBER float value(uint8_t code) { return static_cast<float>((code ^ 8) - 8); }
};

template <int Mantissa, int Bias>
struct Fp8 {
  static constexpr int kBlock = math::kFp8Block;
  static constexpr float kLargest = Mantissa == 3 ? math::kE4m3Largest : math::kE5m2Largest;
  SPU_HD_MEMBER uint8_t code(float x, float scale) {
    return static_cast<uint8_t>(math::fp8_code<Mantissa, Bias, float>(x, scale, kLargest));
  }
  SPU_HD_MEMBER float value(uint8_t code) { return math::fp8_value<Mantissa, Bias, float>(code); }
};

template <class Format>
SPU_INLINE void put_code(uint8_t* codes, int64_t i, uint8_t code) {
  if constexpr (Format::kBlock == math::kInt4Block) {
    if (i % 2 == 0) {
      codes[i / 2] = code;  // the first of a pair clears the other's bits
    } else {
      codes[i / 2] |= static_cast<uint8_t>(code << 4);
    }
  } else {
    codes[i] = code;
  }
}

template <class Format>
SPU_INLINE uint8_t get_code(const uint8_t* codes, int64_t i) {
  if constexpr (Format::kBlock == math::kInt4Block) return (codes[i / 2] >> (i % 2 * 4)) & 15;
  return codes[i];
}

// A block's values, widened; returns how many there are.
template <class T>
SPU_INLINE int64_t widen_block(const T* x, int64_t numel, int64_t at, int64_t block, float* out) {
  const int64_t n = numel - at < block ? numel - at : block;
  for (int64_t i = 0; i < n; i += kLanes) {
    store_some(out + i, load_some(x + at + i, n - i < kLanes ? n - i : kLanes), n - i < kLanes ? n - i : kLanes);
  }
  return n;
}

template <class Format, class T>
static void small_encode_typed(const void* data, int64_t numel, float* scales, uint8_t* codes, int64_t begin,
                               int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * Format::kBlock;
    float v[Format::kBlock];
    const int64_t n = widen_block(static_cast<const T*>(data), numel, at, Format::kBlock, v);
    uint32_t top = 0;  // over bit patterns, as in codec_kernels.h
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t a = math::Ops<float>::bits(v[i]) & 0x7fffffffu;
      top = a > top ? a : top;
    }
    const float scale = math::block_scale(math::Ops<float>::from_bits(top), Format::kLargest);
    scales[b] = scale;
    const bool coded = math::int8_scale_codes(scale);
    for (int64_t i = 0; i < n; ++i) put_code<Format>(codes, at + i, coded ? Format::code(v[i], scale) : uint8_t{0});
  }
}

template <class Format, class T>
static void small_decode_typed(void* data, int64_t numel, const float* scales, const uint8_t* codes, int64_t begin,
                               int64_t end) {
  T* x = static_cast<T*>(data);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * Format::kBlock, n = numel - at < Format::kBlock ? numel - at : Format::kBlock;
    float v[Format::kBlock];
    for (int64_t i = 0; i < n; ++i) v[i] = Format::value(get_code<Format>(codes, at + i)) * scales[b];
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t some = n - i < kLanes ? n - i : kLanes;
      store_some(x + at + i, load_some(v + i, some), some);
    }
  }
}

template <class Format>
static void small_encode_format(cpu::Type type, const void* x, int64_t numel, float* scales, uint8_t* codes,
                                int64_t begin, int64_t end) {
  if (type == cpu::Type::fp16) return small_encode_typed<Format, Fp16>(x, numel, scales, codes, begin, end);
  if (type == cpu::Type::bf16) return small_encode_typed<Format, Bf16>(x, numel, scales, codes, begin, end);
  return small_encode_typed<Format, float>(x, numel, scales, codes, begin, end);
}

template <class Format>
static void small_decode_format(cpu::Type type, void* x, int64_t numel, const float* scales, const uint8_t* codes,
                                int64_t begin, int64_t end) {
  if (type == cpu::Type::fp16) return small_decode_typed<Format, Fp16>(x, numel, scales, codes, begin, end);
  if (type == cpu::Type::bf16) return small_decode_typed<Format, Bf16>(x, numel, scales, codes, begin, end);
  return small_decode_typed<Format, float>(x, numel, scales, codes, begin, end);
}

static void small_encode(wire::Codec codec, cpu::Type type, const void* x, int64_t numel, float* scales, uint8_t* codes,
                         int64_t begin, int64_t end) {
  if (codec == wire::Codec::int4) return small_encode_format<Int4>(type, x, numel, scales, codes, begin, end);
  if (codec == wire::Codec::fp8_e4m3) {
    return small_encode_format<Fp8<3, 7>>(type, x, numel, scales, codes, begin, end);
  }
  return small_encode_format<Fp8<2, 15>>(type, x, numel, scales, codes, begin, end);
}

static void small_decode(wire::Codec codec, cpu::Type type, void* x, int64_t numel, const float* scales,
                         const uint8_t* codes, int64_t begin, int64_t end) {
  if (codec == wire::Codec::int4) return small_decode_format<Int4>(type, x, numel, scales, codes, begin, end);
  if (codec == wire::Codec::fp8_e4m3) {
    return small_decode_format<Fp8<3, 7>>(type, x, numel, scales, codes, begin, end);
  }
  return small_decode_format<Fp8<2, 15>>(type, x, numel, scales, codes, begin, end);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
