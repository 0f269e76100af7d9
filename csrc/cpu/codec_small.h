// Block-wise int4 and fp8. Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/kernels.h"
#include "cpu/vec_codes.h"
#include "math/codec.h"

namespace spu::SPU_ISA_NS {

// 32 codes in [-7, 7] to 16 bytes, the first of each pair in the low four bits, and back.
SPU_INLINE void join_nibbles(const int8_t* codes, uint8_t* bytes) {
#if defined(SPU_VEC_AVX512) || defined(SPU_VEC_AVX2)
  const __m256i low = _mm256_and_si256(load_raw<__m256i>(codes), _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(low, _mm256_set1_epi16(0x1001));  // first + 16 * second
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  store_raw(bytes, _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < 16; ++i) {
    bytes[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (static_cast<uint8_t>(codes[2 * i + 1]) << 4));
  }
#endif
}
SPU_INLINE void split_nibbles(const uint8_t* bytes, int8_t* codes) {
#if defined(SPU_VEC_AVX512) || defined(SPU_VEC_AVX2)
  const __m256i pairs = _mm256_cvtepu8_epi16(load_raw<__m128i>(bytes));
  const __m256i high = _mm256_slli_epi16(_mm256_and_si256(pairs, _mm256_set1_epi16(0xf0)), 4);
  const __m256i both = _mm256_or_si256(_mm256_and_si256(pairs, _mm256_set1_epi16(15)), high);
  const __m256i eight = _mm256_set1_epi8(8);
  store_raw(codes, _mm256_sub_epi8(_mm256_xor_si256(both, eight), eight));  // sign extension
#else
  for (int i = 0; i < 16; ++i) {
    codes[2 * i] = static_cast<int8_t>(static_cast<int8_t>(bytes[i] << 4) >> 4);
    codes[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(bytes[i]) >> 4);
  }
#endif
}

// A format codes a block of values that were divided by its scale, in vectors, to bytes, and back.
struct Int4 {
  static constexpr int kBlock = math::kInt4Block, kBytes = kBlock / 2;
  static constexpr float kLargest = math::kInt4Largest;

  // Two codes a byte, the first in the low four bits.
  SPU_HD_MEMBER void encode(const vf* v, uint8_t* bytes) {
    int8_t codes[kBlock < 4 * kLanes ? 4 * kLanes : kBlock];
    if constexpr (kBlock >= 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kBlock / kLanes; i += 4) store_rounded(codes + i * kLanes, v + i);
    } else {
      const vf padded[4] = {v[0], v[1], vf{}, vf{}};
      store_rounded(codes, padded);
    }
    join_nibbles(codes, bytes);
  }
  SPU_HD_MEMBER void decode(const uint8_t* bytes, vf* v) {
    int8_t codes[kBlock];
    split_nibbles(bytes, codes);
    for (int i = 0; i < kBlock / kLanes; ++i) v[i] = __builtin_convertvector(load_codes(codes + i * kLanes), vf);
  }
};

template <int Mantissa, int Bias>
struct Fp8 {
  static constexpr int kBlock = math::kFp8Block, kBytes = kBlock;
  static constexpr float kLargest = Mantissa == 3 ? math::kE4m3Largest : math::kE5m2Largest;

  SPU_HD_MEMBER void encode(const vf* v, uint8_t* bytes) {
    for (int i = 0; i < kBlock / kLanes; ++i) {
      store_bytes(bytes + i * kLanes, math::fp8_code<Mantissa, Bias, vf>(v[i], O::splat(1.0f), kLargest));
    }
  }
  SPU_HD_MEMBER void decode(const uint8_t* bytes, vf* v) {
    for (int i = 0; i < kBlock / kLanes; ++i) {
      v[i] = math::fp8_value<Mantissa, Bias, vf>(load_bytes(bytes + i * kLanes));
    }
  }
};

template <class Format, class T>
SPU_INLINE float small_encode_block(const T* x, uint8_t* bytes) {
  vf v[Format::kBlock / kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Format::kBlock / kLanes; ++i) v[i] = load(x + i * kLanes);
  const float scale = math::block_scale(block_absmax(v), Format::kLargest);
  if (math::int8_scale_codes(scale)) {
    divide_block(v, scale);
    Format::encode(v, bytes);
  } else {
    memset(bytes, 0, Format::kBytes);
  }
  return scale;
}

template <class Format, class T>
SPU_INLINE void small_decode_block(T* x, float scale, const uint8_t* bytes) {
  vf v[Format::kBlock / kLanes];
  Format::decode(bytes, v);
#pragma GCC unroll 16
  for (int i = 0; i < Format::kBlock / kLanes; ++i) store(x + i * kLanes, v[i] * scale);
}

// Bytes that n < kBlock values of the last block take.
template <class Format>
SPU_INLINE size_t tail_bytes(int64_t n) {
  return static_cast<size_t>(Format::kBytes == Format::kBlock ? n : (n + 1) / 2);
}

template <class Format, class T>
static void small_encode_typed(const void* data, int64_t numel, float* scales, uint8_t* codes, int64_t begin,
                               int64_t end) {
  const T* x = static_cast<const T*>(data);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * Format::kBlock, n = numel - at;
    if (n >= Format::kBlock) {
      scales[b] = small_encode_block<Format>(x + at, codes + b * Format::kBytes);
    } else {
      T tmp[Format::kBlock];
      uint8_t bytes[Format::kBytes];
      memset(tmp, 0, sizeof tmp);
      memcpy(tmp, x + at, sizeof(T) * static_cast<size_t>(n));
      scales[b] = small_encode_block<Format>(tmp, bytes);
      memcpy(codes + b * Format::kBytes, bytes, tail_bytes<Format>(n));
    }
  }
}

template <class Format, class T>
static void small_decode_typed(void* data, int64_t numel, const float* scales, const uint8_t* codes, int64_t begin,
                               int64_t end) {
  T* x = static_cast<T*>(data);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * Format::kBlock, n = numel - at;
    if (n >= Format::kBlock) {
      small_decode_block<Format>(x + at, scales[b], codes + b * Format::kBytes);
    } else {
      T out[Format::kBlock];
      uint8_t bytes[Format::kBytes] = {};
      memcpy(bytes, codes + b * Format::kBytes, tail_bytes<Format>(n));
      small_decode_block<Format>(out, scales[b], bytes);
      memcpy(x + at, out, sizeof(T) * static_cast<size_t>(n));
    }
  }
}

template <class Format>
static void small_encode_format(Type type, const void* x, int64_t numel, float* scales, uint8_t* codes, int64_t begin,
                                int64_t end) {
  if (type == Type::fp16) return small_encode_typed<Format, Fp16>(x, numel, scales, codes, begin, end);
  if (type == Type::bf16) return small_encode_typed<Format, Bf16>(x, numel, scales, codes, begin, end);
  return small_encode_typed<Format, float>(x, numel, scales, codes, begin, end);
}

template <class Format>
static void small_decode_format(Type type, void* x, int64_t numel, const float* scales, const uint8_t* codes,
                                int64_t begin, int64_t end) {
  if (type == Type::fp16) return small_decode_typed<Format, Fp16>(x, numel, scales, codes, begin, end);
  if (type == Type::bf16) return small_decode_typed<Format, Bf16>(x, numel, scales, codes, begin, end);
  return small_decode_typed<Format, float>(x, numel, scales, codes, begin, end);
}

static void small_encode(wire::Codec codec, Type type, const void* x, int64_t numel, float* scales, uint8_t* codes,
                         int64_t begin, int64_t end) {
  if (codec == wire::Codec::int4) return small_encode_format<Int4>(type, x, numel, scales, codes, begin, end);
  if (codec == wire::Codec::fp8_e4m3) {
    return small_encode_format<Fp8<3, 7>>(type, x, numel, scales, codes, begin, end);
  }
  return small_encode_format<Fp8<2, 15>>(type, x, numel, scales, codes, begin, end);
}

static void small_decode(wire::Codec codec, Type type, void* x, int64_t numel, const float* scales,
                         const uint8_t* codes, int64_t begin, int64_t end) {
  if (codec == wire::Codec::int4) return small_decode_format<Int4>(type, x, numel, scales, codes, begin, end);
  if (codec == wire::Codec::fp8_e4m3) {
    return small_decode_format<Fp8<3, 7>>(type, x, numel, scales, codes, begin, end);
  }
  return small_decode_format<Fp8<2, 15>>(type, x, numel, scales, codes, begin, end);
}

}  // namespace spu::SPU_ISA_NS
