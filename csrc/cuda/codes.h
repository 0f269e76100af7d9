// Eight codes of 8 or 4 bits at a time.
#pragma once

#include "cuda/vector.h"

namespace spu::cuda {

// Codes i .. i + 8: one store of 8 or 4 bytes (i is a multiple of 8, the payload 64-byte aligned in the wire).
template <int kBits>
SPU_DEVICE void store_codes(uint8_t* payload, int64_t i, int64_t n, bool wide, const uint32_t* codes) {
  uint32_t word[2] = {0, 0};
  for (int j = 0; j < kVector; ++j) word[j * kBits / 32] |= codes[j] << (j * kBits % 32);
  const int64_t at = i * kBits / 8;
  if (wide && i + kVector <= n) {
    if (kBits == 8) {
      *reinterpret_cast<Bytes8*>(payload + at) = {{word[0], word[1]}};
    } else {
      *reinterpret_cast<uint32_t*>(payload + at) = word[0];
    }
    return;
  }
  const int64_t bytes = (n * kBits + 7) / 8 - at;
  for (int j = 0; j < kBits && j < bytes; ++j) payload[at + j] = static_cast<uint8_t>(word[j / 4] >> (j % 4 * 8));
}

template <int kBits>
SPU_DEVICE void load_codes(const uint8_t* payload, int64_t i, int64_t n, bool wide, uint32_t* codes) {
  uint32_t word[2] = {0, 0};
  const int64_t at = i * kBits / 8;
  if (wide && i + kVector <= n) {
    if (kBits == 8) {
      const Bytes8 raw = *reinterpret_cast<const Bytes8*>(payload + at);
      word[0] = raw.word[0];
      word[1] = raw.word[1];
    } else {
      word[0] = *reinterpret_cast<const uint32_t*>(payload + at);
    }
  } else {
    const int64_t bytes = (n * kBits + 7) / 8 - at;
    for (int j = 0; j < kBits && j < bytes; ++j) word[j / 4] |= static_cast<uint32_t>(payload[at + j]) << (j % 4 * 8);
  }
  for (int j = 0; j < kVector; ++j) codes[j] = (word[j * kBits / 32] >> (j * kBits % 32)) & ((1u << kBits) - 1u);
}

}  // namespace spu::cuda
