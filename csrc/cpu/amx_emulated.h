// The functions of amx_tiles.h in plain vector arithmetic, for tests on processors without the instructions. Included
// in the namespace of an instruction set.
//
// tdpbf16ps as its manual defines it: denormal inputs, sums and results count as zero; the products of the first and of
// the second places of a row's pairs are summed apart, then together, then added to C. A product of two bf16 values is
// exact in fp32, so that a multiplication and an addition round as the fused ones do.
#pragma once

#include <stdlib.h>

namespace spu::SPU_ISA_NS {

struct EmulatedTile {
  alignas(64) vu row[kTileRows];
};
static thread_local EmulatedTile emulated_tiles[8];
static thread_local bool emulated_shapes = false;

// A tile instruction without shapes is an invalid opcode.
SPU_INLINE EmulatedTile& emulated(int t) {
  if (!emulated_shapes) abort();
  return emulated_tiles[t];
}

template <int T>
SPU_INLINE void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i) emulated(T).row[i] = load_raw<vu>(static_cast<const char*>(p) + i * stride);
}
template <int T>
SPU_INLINE void tile_stream(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
SPU_INLINE void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i) store_raw(static_cast<char*>(p) + i * stride, emulated(T).row[i]);
}
template <int T>
SPU_INLINE void tile_zero() {
  emulated(T) = EmulatedTile{};
}

SPU_INLINE vf without_denormals(vu bits) {
  return (vf)((bits & 0x7fffffffu) < 0x00800000u ? bits & 0x80000000u : bits);
}
SPU_INLINE vf without_denormals(vf v) {
  return without_denormals((vu)v);
}

static void emulated_dot(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  vf first[kTileRows], second[kTileRows];
  for (int k = 0; k < kTileRows; ++k) {
    first[k] = without_denormals(b.row[k] << 16), second[k] = without_denormals(b.row[k] & 0xffff0000u);
  }
  for (int i = 0; i < kTileRows; ++i) {
    const vf one = without_denormals(a.row[i] << 16), two = without_denormals(a.row[i] & 0xffff0000u);
    vf sum = {}, other = {};
    for (int k = 0; k < kTileRows; ++k) {
      sum = without_denormals(sum + one[k] * first[k]);
      other = without_denormals(other + two[k] * second[k]);
    }
    c.row[i] = (vu)without_denormals(without_denormals(c.row[i]) + without_denormals(sum + other));
  }
}
template <int C, int A, int B>
SPU_INLINE void tile_dot() {
  emulated_dot(emulated(C), emulated(A), emulated(B));
}

struct Tiles {
  Tiles() { emulated_shapes = true; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { emulated_shapes = false; }
};

}  // namespace spu::SPU_ISA_NS
