// The operands of attention's products on tiles: where they lie and how they are packed. Included in the namespace of
// an instruction set.
//
// The weights that go from one product into the next are fp32 values between 0 and 1, or their gradients: each is
// rounded to the sum of two bf16 parts, at least 16 bits, five more than the storage types have.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/gemm_amx.h"

namespace spu::SPU_ISA_NS {

static_assert(kNR == kPanelRows, "a panel of queries is one of tiles");

constexpr int64_t kBlockFloats = kPanelRows * kPanelRows;
constexpr int64_t kWeightValues = 2 * 2 * kTileValues;  // two parts of a block's weights

// Products of two operands in storage, and those with weights on the one side or the other.
template <class T>
constexpr Chain kOfStorage = T::is_fp16 ? Chain::four : Chain::one;
template <class T>
constexpr Chain kByWeights = T::is_fp16 ? Chain::three : Chain::two_right;
template <class T>
constexpr Chain kOfWeights = T::is_fp16 ? Chain::three : Chain::two_left;

// A head's operands and sums. `turned`: V^T in the forward, K^T in the backward.
struct TileHead {
  uint16_t *k, *v, *turned;                 // left operands: keys x head_dim twice, head_dim x keys
  uint16_t *q, *dout, *q_rows, *dout_rows;  // right ones of one query panel: head_dim x queries, queries x head_dim
  uint16_t* weights;
  float *s, *ds;   // [keys, 32]
  float* out;      // [head_dim, 32]
  float *dk, *dv;  // [keys, columns]
  uint8_t* bad;    // [keys]: 1 if the key of an fp16 head is not finite
  bool any_bad;
  int64_t first_bad_value;  // the first key whose value is not finite
  int64_t keys, depth;      // panels
  int64_t columns;          // head_dim rounded up to whole panels
};

template <class T>
static TileHead tile_head(const cpu::Attention& a, bool backward) {
  TileHead h = {};
  h.keys = ceil_div(a.keys, kPanelRows), h.depth = ceil_div(a.head_dim, kPanelRows);
  h.columns = h.depth * kPanelRows;
  const int64_t some = h.depth * kStepValues<T> / 2, all = h.keys * some, scores = (h.keys + 1) * kBlockFloats;
  const int64_t sums = h.keys * kPanelRows * h.columns;
  uint16_t** const packed[] = {&h.k, &h.v, &h.turned, &h.q, &h.dout, &h.q_rows, &h.dout_rows, &h.weights};
  const int64_t packed_floats[] = {all, all * backward, all, some, some, some, some, h.keys * kWeightValues / 2};
  float** const values[] = {&h.s, &h.ds, &h.out, &h.dk, &h.dv};
  const int64_t floats[] = {scores, scores * backward, h.depth * kBlockFloats, sums * backward, sums * backward};
  int64_t total = ceil_div(a.keys, 64) * 16;
  for (const int64_t size : packed_floats) total += size;
  for (const int64_t size : floats) total += size;
  float* at = cpu::workspace(cpu::kSharedA, total);  // kLocalB is that of the kernels on vectors
  for (int i = 0; i < 8; ++i) *packed[i] = reinterpret_cast<uint16_t*>(at), at += packed_floats[i];
  for (int i = 0; i < 5; ++i) *values[i] = at, at += floats[i];
  h.bad = reinterpret_cast<uint8_t*>(at);
  return h;
}

// A matrix [tokens, head_dim] as left panels of tokens; and, turned, as panels of head_dim whose pairs along the tokens
// lie 16 apart, as those of the weights do. True if an fp16 value is not finite.
template <class T>
static bool pack_tokens(const TileHead& h, uint16_t* out, const cpu::Operand& x, int64_t tokens, int64_t head_dim) {
  return pack_steps<T, false>(out, h.depth * kStepValues<T>, x, 0, tokens, 0, head_dim, 0, h.keys);
}
template <class T>
static bool pack_turned(const TileHead& h, uint16_t* out, const cpu::Operand& x, int64_t tokens, int64_t head_dim) {
  return pack_run<T, Run::across, false, true>(out, h.keys * kStepValues<T>, turned(x), 0, head_dim, 0, tokens, 0,
                                               h.depth);
}
// One query panel as a right operand, with head_dim or with the queries as the inner dimension.
template <class T>
static bool pack_queries(uint16_t* out, const cpu::Operand& x, const QueryPanel& p, int64_t head_dim) {
  return pack_steps<T, true>(out, 0, x, p.q0, p.q0 + p.valid, 0, head_dim, 0, 1);
}
template <class T>
static void pack_query_rows(const TileHead& h, uint16_t* out, const cpu::Operand& x, const QueryPanel& p,
                            int64_t head_dim) {
  pack_run<T, Run::across, true, true>(out, kStepValues<T>, turned(x), 0, head_dim, p.q0, p.valid, 0, h.depth);
}

// Two vectors of weights to a row of both parts' tiles.
SPU_INLINE void store_weights(uint16_t* out, const float* x, const float* y) {
  vu parts[2];
  vf left = {};
  split_pairs(load(x), load(y), parts, left);
  store_raw(out, parts[0]), store_raw(out + 2 * kTileValues, parts[1]);
}

// Weights [keys, 32] as the right operand keys x queries, and transposed as the left one, queries along k.
static void pack_weights_right(uint16_t* out, const float* s, int64_t panels) {
  for (int64_t i = 0; i < panels; ++i, out += kWeightValues, s += kBlockFloats) {
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float* x = s + r * kPanelRows + half * kLanes;
        store_weights(out + half * kTileValues + r * kTileDepth, x, x + kTileRows * kPanelRows);
      }
    }
  }
}
static void pack_weights_left(uint16_t* out, const float* s, int64_t panels) {
  for (int64_t i = 0; i < panels; ++i, out += kWeightValues, s += kBlockFloats) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      store_weights(out + r * kTileDepth, s + r * kPanelRows, s + r * kPanelRows + kLanes);
    }
  }
}

}  // namespace spu::SPU_ISA_NS
