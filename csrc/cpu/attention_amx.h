// Attention's products on tiles, for bf16 and fp16. Included in the namespace of an instruction set.
//
// Scores are made as in attention_kernels.h, transposed and a panel of 32 queries at a time, and what happens to them
// between the products is that file's. In the forward the scores of fp16 values that are not finite are made without
// tiles, so that queries that do not see them keep every bit; a backward with such values is that file's altogether.
#pragma once

#include "cpu/attention_amx_pack.h"

namespace spu::SPU_ISA_NS {

SPU_INLINE int64_t key_panels(const QueryPanel& p) {
  return ceil_div(p.keys, kPanelRows);
}

// c [keys, 32] = left panels of the keys that p sees, times a right panel; rows beyond its keys are 0 afterwards.
template <class T>
static void scores_of(const TileHead& h, const QueryPanel& p, const uint16_t* left, const uint16_t* right, float* c) {
  for (int64_t i = 0; i < key_panels(p); ++i) {
    tile_kernel<kOfStorage<T>>(h.depth, packed_left<kOfStorage<T>>(left + i * h.depth * kStepValues<T>), right,
                               c + i * kBlockFloats, kPanelRows, false, Ahead{});
  }
}
static void clear_unseen(const QueryPanel& p, float* c) {
  const int64_t rows = key_panels(p) * kPanelRows - p.keys;
  memset(c + p.keys * kPanelRows, 0, sizeof(float) * static_cast<size_t>(rows * kPanelRows));
}

// out [head_dim, 32] = the turned panels times the weights
template <class T>
static void turned_times_weights(const TileHead& h, const QueryPanel& p) {
  for (int64_t d = 0; d < h.depth; ++d) {
    tile_kernel<kByWeights<T>>(key_panels(p), packed_left<kByWeights<T>>(h.turned + d * h.keys * kStepValues<T>),
                               h.weights, h.out + d * kBlockFloats, kPanelRows, false, Ahead{});
  }
}

template <class T>
SPU_INLINE const T* row_of(const cpu::Operand& x, int64_t i) {
  return static_cast<const T*>(x.data) + i * x.row;
}

template <class T>
static bool finite_row(const cpu::Operand& x, int64_t i, int64_t cols) {
  vi bad = {};
  for_vectors(cols, [&](int64_t j, int64_t left)
                        SPU_LAMBDA { bad |= math::is_nonfinite<vf>(load_upto(row_of<T>(x, i) + j, left)); });
  return !any(bad);
}

template <class T>
static float score(const cpu::Operand& q, int64_t query, const cpu::Operand& k, int64_t key, int64_t head_dim) {
  vf sum = {};
  for_vectors(head_dim, [&](int64_t j, int64_t left) SPU_LAMBDA {
    sum = O::fma(load_upto(row_of<T>(q, query) + j, left), load_upto(row_of<T>(k, key) + j, left), sum);
  });
  return sum_of(sum);
}

// Scores of fp16 keys and queries that have no two parts, without them: those that a query does not meet keep every
// bit.
template <class T>
static void repair_scores(const TileHead& h, const QueryPanel& p, const cpu::Operand& q, const cpu::Operand& k,
                          int64_t head_dim, bool bad_queries) {
  for (int64_t j = 0; j < p.valid; ++j) {
    const bool all = bad_queries && !finite_row<T>(q, p.q0 + j, head_dim);
    if (!all && !h.any_bad) continue;
    for (int64_t key = 0; key < p.keys; ++key) {
      if (all || h.bad[key]) h.s[key * kPanelRows + j] = score<T>(q, p.q0 + j, k, key, head_dim);
    }
  }
}

template <class T>
static void queries_on_tiles(const cpu::Attention& a, const TileHead& h, const QueryPanel& p, int64_t pair) {
  const int64_t batch = pair / a.heads, head = pair % a.heads;
  const cpu::Operand q = head_of(a, a.q, batch, head), k = head_of(a, a.k, batch, head / (a.heads / a.kv_heads));
  vf most[kNV], sum[kNV], inverse[kNV];
  const bool bad = pack_queries<T>(h.q, q, p, a.head_dim);
  scores_of<T>(h, p, h.k, h.q, h.s);
  if (bad || h.any_bad) repair_scores<T>(h, p, q, k, a.head_dim, bad);
  softmax_of_panel(p, a.scale, h.s, most, sum);
  clear_unseen(p, h.s);
  pack_weights_right(h.weights, h.s, key_panels(p));
  turned_times_weights<T>(h, p);
  float *lse = a.lse + pair * a.queries + p.q0, sums[kNR], tops[kNR];
#pragma GCC unroll 4
  for (int g = 0; g < kNV; ++g) {
    inverse[g] = 1.0f / sum[g];
    store(sums + g * kLanes, sum[g]), store(tops + g * kLanes, most[g]);
  }
  for (int64_t j = 0; j < p.valid; ++j) lse[j] = a.scale * tops[j] + logf(sums[j]);
  store_queries(a.type, p, a.head_dim, h.out, inverse, result_of(a, a.out, batch, a.queries, a.heads, head),
                a.heads * a.head_dim);
}

// One key and value head's operands, and which of its fp16 rows are not finite.
template <class T>
static void pack_head(const cpu::Attention& a, TileHead& h, int64_t batch, int64_t kv_head) {
  const cpu::Operand k = head_of(a, a.k, batch, kv_head), v = head_of(a, a.v, batch, kv_head);
  h.any_bad = pack_tokens<T>(h, h.k, k, a.keys, a.head_dim);
  for (int64_t i = 0; h.any_bad && i < a.keys; ++i) h.bad[i] = !finite_row<T>(k, i, a.head_dim);
  h.first_bad_value = a.keys;
  if (!pack_turned<T>(h, h.turned, v, a.keys, a.head_dim)) return;
  h.first_bad_value = 0;
  while (finite_row<T>(v, h.first_bad_value, a.head_dim)) ++h.first_bad_value;
}

template <class T>
static void forward_on_tiles(const cpu::Attention& a, int64_t begin, int64_t end) {
  TileHead h = tile_head<T>(a, false);
  const int64_t panels = ceil_div(a.queries, kNR), each = ceil_div(panels, a.query_chunks);
  cpu::Attention by_panel = a;
  by_panel.query_chunks = panels;
  const Tiles tiles;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.query_chunks, pair = task / a.query_chunks;
    const int64_t batch = pair / a.heads, kv_head = pair % a.heads / (a.heads / a.kv_heads);
    if (packed != batch * a.kv_heads + kv_head) pack_head<T>(a, h, batch, kv_head);
    packed = batch * a.kv_heads + kv_head;
    for (int64_t i = chunk * each; i < least(panels, (chunk + 1) * each); ++i) {
      const QueryPanel p = query_panel(a, i * kNR);
      if (h.first_bad_value < p.keys) {
        attention(by_panel, pair * panels + i, pair * panels + i + 1);
      } else {
        queries_on_tiles<T>(a, h, p, pair);
      }
    }
  }
}

// sums [keys, columns] += the weights' left panels times rows [queries, head_dim]
template <class T>
static void add_weights_times(const TileHead& h, const QueryPanel& p, const uint16_t* rows, float* sums) {
  for (int64_t i = 0; i < key_panels(p); ++i) {
    for (int64_t d = 0; d < h.depth; ++d) {
      add_tile_step<kOfWeights<T>>(h.weights + i * kWeightValues, rows + d * kStepValues<T>,
                                   sums + i * kPanelRows * h.columns + d * kPanelRows, h.columns);
    }
  }
}

// False if the panel holds an fp16 value that is not finite; nothing that stays is written then.
template <class T>
static bool queries_backward(const cpu::Attention& a, const TileHead& h, const QueryPanel& p, int64_t batch,
                             int64_t head) {
  const cpu::Operand q = head_of(a, a.q, batch, head), dout = head_of(a, a.dout, batch, head);
  if (pack_queries<T>(h.q, q, p, a.head_dim) || pack_queries<T>(h.dout, dout, p, a.head_dim)) return false;
  pack_query_rows<T>(h, h.q_rows, q, p, a.head_dim), pack_query_rows<T>(h, h.dout_rows, dout, p, a.head_dim);
  float lse[kNR] = {}, delta[kNR] = {};
  memcpy(lse, a.lse + (batch * a.heads + head) * a.queries + p.q0, sizeof(float) * static_cast<size_t>(p.valid));
  row_products<T>(p, a.head_dim, dout, head_of(a, a.saved_out, batch, head), delta);
  scores_of<T>(h, p, h.k, h.q, h.s), scores_of<T>(h, p, h.v, h.dout, h.ds);
  scores_backward(p, a.scale, lse, delta, h.s, h.ds);
  clear_unseen(p, h.s), clear_unseen(p, h.ds);
  pack_weights_left(h.weights, h.s, key_panels(p));
  add_weights_times<T>(h, p, h.dout_rows, h.dv);
  pack_weights_left(h.weights, h.ds, key_panels(p));
  add_weights_times<T>(h, p, h.q_rows, h.dk);
  pack_weights_right(h.weights, h.ds, key_panels(p));
  turned_times_weights<T>(h, p);
  vf one[kNV];
  for (int g = 0; g < kNV; ++g) one[g] = O::splat(1.0f);
  store_queries(a.type, p, a.head_dim, h.out, one, result_of(a, a.dq, batch, a.queries, a.heads, head),
                a.heads * a.head_dim);
  return true;
}

// One key and value head. False where fp16 values are not finite.
template <class T>
static bool head_backward(const cpu::Attention& a, const TileHead& h, int64_t batch, int64_t kv_head) {
  const cpu::Operand k = head_of(a, a.k, batch, kv_head), v = head_of(a, a.v, batch, kv_head);
  if (pack_tokens<T>(h, h.k, k, a.keys, a.head_dim) || pack_tokens<T>(h, h.v, v, a.keys, a.head_dim)) return false;
  pack_turned<T>(h, h.turned, k, a.keys, a.head_dim);
  const size_t sums = sizeof(float) * static_cast<size_t>(h.keys * kPanelRows * h.columns);
  const int64_t group = a.heads / a.kv_heads;
  memset(h.dk, 0, sums), memset(h.dv, 0, sums);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t q0 = 0; q0 < a.queries; q0 += kNR) {
      if (!queries_backward<T>(a, h, query_panel(a, q0), batch, head)) return false;
    }
  }
  store_keys<T>(a, h.dk, h.columns, result_of(a, a.dk, batch, a.keys, a.kv_heads, kv_head));
  store_keys<T>(a, h.dv, h.columns, result_of(a, a.dv, batch, a.keys, a.kv_heads, kv_head));
  return true;
}

template <class T>
static void backward_on_tiles(const cpu::Attention& a, int64_t begin, int64_t end) {
  const TileHead h = tile_head<T>(a, true);
  const Tiles tiles;
  for (int64_t task = begin; task < end; ++task) {
    if (!head_backward<T>(a, h, task / a.kv_heads, task % a.kv_heads)) attention_backward(a, task, task + 1);
  }
}

SPU_INLINE bool tiles_serve(const cpu::Attention& a) {
  if (a.type == Type::fp32) return false;
  const cpu::TileRule rule = cpu::tile_rule(a.type);
  return a.queries >= rule.rows && a.keys >= rule.columns && a.head_dim >= rule.depth;
}

static void tile_attention(const cpu::Attention& a, int64_t begin, int64_t end) {
  if (!tiles_serve(a)) return attention(a, begin, end);
  if (a.type == Type::fp16) return forward_on_tiles<Fp16>(a, begin, end);
  forward_on_tiles<Bf16>(a, begin, end);
}

static void tile_attention_backward(const cpu::Attention& a, int64_t begin, int64_t end) {
  if (!tiles_serve(a)) return attention_backward(a, begin, end);
  if (a.type == Type::fp16) return backward_on_tiles<Fp16>(a, begin, end);
  backward_on_tiles<Bf16>(a, begin, end);
}

}  // namespace spu::SPU_ISA_NS
