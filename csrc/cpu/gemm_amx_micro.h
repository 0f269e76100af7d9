// The micro-kernel on tiles: 32 x 32 of C in four accumulator tiles. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_amx_pack.h"

namespace spu::SPU_ISA_NS {

// Which part of A meets which of B. One: bf16. Two: one side has two parts. Three: both have, without lo * lo. Four: in
// full. The smallest products come first, and from one to the next only one side is loaded anew.
enum class Chain { one, two_left, two_right, three, four };

struct PartPair {
  int a, b;
};
template <Chain>
struct Order {
  static constexpr int a_parts = 1, b_parts = 1, count = 1;
  static constexpr PartPair pairs[] = {{0, 0}};
};
template <>
struct Order<Chain::two_left> {
  static constexpr int a_parts = 2, b_parts = 1, count = 2;
  static constexpr PartPair pairs[] = {{1, 0}, {0, 0}};
};
template <>
struct Order<Chain::two_right> {
  static constexpr int a_parts = 1, b_parts = 2, count = 2;
  static constexpr PartPair pairs[] = {{0, 1}, {0, 0}};
};
template <>
struct Order<Chain::three> {
  static constexpr int a_parts = 2, b_parts = 2, count = 3;
  static constexpr PartPair pairs[] = {{0, 1}, {0, 0}, {1, 0}};
};
template <>
struct Order<Chain::four> {
  static constexpr int a_parts = 2, b_parts = 2, count = 4;
  static constexpr PartPair pairs[] = {{1, 1}, {0, 1}, {0, 0}, {1, 0}};
};

// Matrices of an epilogue, of one row length and value size.
struct Targets {
  const char* at[2];
  int64_t count, stride, bytes;  // of a row, of a value

  void add(const void* matrix) {
    if (matrix) at[count++] = static_cast<const char*>(matrix);
  }
};

// Their memory that is asked for while tiles are multiplied: `rows` rows from `offset` on, 32 values of each.
struct Ahead {
  const Targets* targets;
  int64_t offset, rows;
};

SPU_INLINE void ask_for_row(const Targets& targets, int64_t offset) {
  for (int64_t t = 0; t < targets.count; ++t) {
    __builtin_prefetch(targets.at[t] + offset, 0, 2);
    if (targets.bytes > 2) __builtin_prefetch(targets.at[t] + offset + 64, 0, 2);
  }
}

// 32 rows of the left operand as tiles: where the first one is, bytes between a tile's rows, 16-bit values from a tile
// to that of the 16 rows below and from one step of k to the next.
struct Left {
  const uint16_t* at;
  int64_t row_bytes, below, step;
};

template <Chain C>
SPU_INLINE Left packed_left(const uint16_t* a) {
  return {a, 64, kTileValues, Order<C>::a_parts * 2 * kTileValues};
}

template <bool Stream>
SPU_INLINE void load_left(const Left& a, int64_t part) {
  const uint16_t* at = a.at + part * 2 * kTileValues;
  if constexpr (Stream) {
    tile_stream<4>(at, a.row_bytes), tile_stream<5>(at + a.below, a.row_bytes);
  } else {
    tile_load<4>(at, a.row_bytes), tile_load<5>(at + a.below, a.row_bytes);
  }
}

// The I-th product of parts of one step of k, and those after it.
template <Chain C, bool Stream, int I = 0>
SPU_INLINE void multiply_step(const Left& a, const uint16_t* b) {
  using Parts = Order<C>;
  constexpr PartPair now = Parts::pairs[I], before = I ? Parts::pairs[I - 1] : PartPair{-1, -1};
  if constexpr (now.b != before.b) {
    const uint16_t* right = b + now.b * 2 * kTileValues;
    tile_stream<6>(right, 64), tile_stream<7>(right + kTileValues, 64);
  }
  if constexpr (now.a != before.a) load_left<Stream>(a, now.a);
  tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  if constexpr (I + 1 < Parts::count) multiply_step<C, Stream, I + 1>(a, b);
}

// c [32, 32] += sums [32, 32]. Adding blocks of k so, and not in one chain, keeps the rounding of long sums that of
// a block's.
SPU_INLINE void add_sums(float* c, int64_t ldc, const float* sums) {
  for (int64_t i = 0; i < kPanelRows; ++i, c += ldc, sums += kPanelRows) {
    store(c, load(c) + load(sums)), store(c + kLanes, load(c + kLanes) + load(sums + kLanes));
  }
}

// c [32, 32], rows ldc floats apart, (+)= a panel of A times a panel of B over `steps` steps of k. The first 32 KB of
// A's panel are loaded so that they stay in L1 for the panels of B that follow; the rest, and B, stream from L2.
template <Chain C>
__attribute__((noinline)) static void tile_kernel(int64_t steps, Left a, const uint16_t* b, float* c, int64_t ldc,
                                                  bool add, Ahead ahead) {
  constexpr int64_t b_step = Order<C>::b_parts * 2 * kTileValues;
  constexpr int64_t kept = (int64_t{1} << 14) / (Order<C>::a_parts * 2 * kTileValues);
  const int64_t each = ceil_div(ahead.rows, steps);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t s = 0; s < steps; ++s, a.at += a.step, b += b_step) {
    for (int64_t i = 0; i < each; ++i, ahead.offset += ahead.targets->stride) {
      ask_for_row(*ahead.targets, ahead.offset);
    }
    if (s < kept) {
      multiply_step<C, false>(a, b);
    } else {
      multiply_step<C, true>(a, b);
    }
  }
  alignas(64) float fresh[kPanelRows * kPanelRows];
  float* out = add ? fresh : c;
  const int64_t row = add ? kPanelRows : ldc;
  float* lower = out + kTileRows * row;
  tile_store<0>(out, row * 4), tile_store<1>(out + kLanes, row * 4);
  tile_store<2>(lower, row * 4), tile_store<3>(lower + kLanes, row * 4);
  if (add) add_sums(c, ldc, fresh);
}

// c [32, 32] += one step of k, for sums that are as many as the steps.
template <Chain C>
__attribute__((noinline)) static void add_tile_step(const uint16_t* a, const uint16_t* b, float* c, int64_t ldc) {
  const int64_t stride = ldc * 4;
  float* lower = c + kTileRows * ldc;
  tile_load<0>(c, stride), tile_load<1>(c + kLanes, stride);
  tile_load<2>(lower, stride), tile_load<3>(lower + kLanes, stride);
  multiply_step<C, false>(packed_left<C>(a), b);
  tile_store<0>(c, stride), tile_store<1>(c + kLanes, stride);
  tile_store<2>(lower, stride), tile_store<3>(lower + kLanes, stride);
}

}  // namespace spu::SPU_ISA_NS
