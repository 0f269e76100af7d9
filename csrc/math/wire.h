// Wire format, version 1: 64-byte header, fp32 scales, payload; the last two padded to 64 bytes; little endian.
#pragma once

#include <stdint.h>

#include "math/hd.h"

namespace spu::wire {

enum class Codec : uint8_t { fp16 = 0, bf16 = 1, int8 = 2, int4 = 3, fp8_e4m3 = 4, fp8_e5m2 = 5 };

constexpr int kMaxDims = 5;
constexpr int64_t kAlign = 64;

struct Header {
  char magic[4];  // "SPUW"
  uint8_t version;
  uint8_t codec;
  uint8_t source;  // Type
  uint8_t ndim;
  uint32_t block;  // values per scale, 0 without scales
  uint32_t pad;
  int64_t numel;
  int64_t dims[kMaxDims];
};
static_assert(sizeof(Header) == 64, "the wire header is 64 bytes");

SPU_HD constexpr int64_t padded(int64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}
constexpr bool is_plain(Codec codec) {
  return codec == Codec::fp16 || codec == Codec::bf16;
}
// Values that share a scale, 0 without scales.
constexpr int64_t block_of(Codec codec) {
  return is_plain(codec) ? 0 : codec == Codec::int4 ? 32 : 64;
}
constexpr int64_t block_count(int64_t numel, Codec codec) {
  return is_plain(codec) ? 0 : (numel + block_of(codec) - 1) / block_of(codec);
}
constexpr int64_t scale_bytes(int64_t numel, Codec codec) {
  return padded(4 * block_count(numel, codec));
}
// int4: two values a byte, the first of each pair in the low four bits.
constexpr int64_t payload_bytes(int64_t numel, Codec codec) {
  return is_plain(codec) ? 2 * numel : codec == Codec::int4 ? (numel + 1) / 2 : numel;
}
constexpr int64_t wire_bytes(int64_t numel, Codec codec) {
  return static_cast<int64_t>(sizeof(Header)) + scale_bytes(numel, codec) + padded(payload_bytes(numel, codec));
}

}  // namespace spu::wire
