// Wire format, version 1: 64-byte header, fp32 scales, payload; the last two padded to 64 bytes; little endian.
#pragma once

#include <stdint.h>

namespace spu {
namespace wire {

enum class Codec : uint8_t { fp16 = 0, bf16 = 1, int8 = 2 };
enum class Source : uint8_t { fp16 = 0, bf16 = 1, fp32 = 2 };

constexpr int kMaxDims = 5;
constexpr int64_t kAlign = 64;

struct Header {
  char magic[4];  // "SPUW"
  uint8_t version;
  uint8_t codec;
  uint8_t source;
  uint8_t ndim;
  uint32_t block;  // values per scale, 0 without scales
  uint32_t pad;
  int64_t numel;
  int64_t dims[kMaxDims];
};
static_assert(sizeof(Header) == 64, "the wire header is 64 bytes");

constexpr int64_t padded(int64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}
constexpr int64_t scale_bytes(int64_t numel, Codec codec, int64_t block) {
  return codec == Codec::int8 ? padded((numel + block - 1) / block * 4) : 0;
}
constexpr int64_t payload_bytes(int64_t numel, Codec codec) {
  return codec == Codec::int8 ? numel : 2 * numel;
}
constexpr int64_t wire_bytes(int64_t numel, Codec codec, int64_t block) {
  return static_cast<int64_t>(sizeof(Header)) + scale_bytes(numel, codec, block) + padded(payload_bytes(numel, codec));
}

}  // namespace wire
}  // namespace spu
