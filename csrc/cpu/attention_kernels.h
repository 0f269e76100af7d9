// Attention, forward and backward, with fp32 inside. Included in the namespace of an instruction set.
//
// A panel of kNR queries is taken at a time and its scores are made transposed, S^T [keys, kNR] = K Q^T: the lanes of
// a vector are queries, so that the softmax over the keys needs no sums across lanes, and S^T lies in memory as the
// packed right-hand side of the product that follows, O^T = V^T S^T. A panel's scores for all keys are kept (64 or 128
// bytes a key), never those of two panels. The backward recomputes them from the saved log-sum-exp, as in Dao et al.,
// "FlashAttention" (2022). Every sum runs in an order that depends on the shape alone.
#pragma once

#include "cpu/gemm_micro.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "math/elementary.h"

namespace spu::SPU_ISA_NS {

SPU_INLINE const void* offset_by(const void* data, Type type, int64_t elements) {
  return static_cast<const char*>(data) + elements * (type == Type::fp32 ? 4 : 2);
}

// One head's matrix [tokens, head_dim].
SPU_INLINE cpu::Operand head_of(const cpu::Attention& a, const cpu::HeadsView& x, int64_t batch, int64_t head) {
  return {offset_by(x.data, a.type, batch * x.batch + head * x.head), a.type, x.token, 1};
}

// Rows [0, rows) of an operand as panels of W rows by all of `k`.
template <int W>
static void pack_panels(float* out, const cpu::Operand& x, int64_t rows, int64_t k) {
  for (int64_t r = 0; r < rows; r += W, out += panel_stride<W>(k)) pack<W, false>(out, x, r, rows, 0, k);
}

SPU_INLINE cpu::Operand turned(const cpu::Operand& x) {
  return {x.data, x.type, x.col, x.row};
}

// c [rows, kNR] = panels of kMR rows x slots, times b [slots, kNR]; c has room for whole panels.
SPU_INLINE void panels_times(const float* panels, int64_t rows, int64_t slots, const float* b, float* c) {
  for (int64_t r = 0; r < rows; r += kMR, panels += panel_stride<kMR>(slots)) {
    micro_kernel<false>(slots, panels, b, c + r * kNR, kNR, false);
  }
}

// c [kMR, kNR] += a [kMR, slots] b [slots, kNR], where a's rows lie kNR apart and c's ldc apart.
__attribute__((noinline)) static void add_rows_times(int64_t slots, const float* a, const float* b, float* c,
                                                     int64_t ldc) {
  vf acc[kMR][kNV];
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) acc[i][j] = load(c + i * ldc + j * kLanes);
  }
  for (int64_t k = 0; k < slots; ++k, b += kNR) multiply_slot<false, kMR>(a + k, kNR, b, acc);
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

// A panel of queries [q0, q0 + valid) of one head and the keys that they see, the first of which `whole` are seen by
// all of them.
struct QueryPanel {
  int64_t q0, valid, keys, whole;
};

SPU_INLINE QueryPanel query_panel(const cpu::Attention& a, int64_t q0) {
  const int64_t end = least(q0 + kNR, a.queries);
  return {q0, end - q0, a.causal ? end : a.keys, a.causal ? q0 + 1 : a.keys};
}

// Lanes of group g whose query sees the key.
SPU_INLINE vi sees(const QueryPanel& p, int g, int64_t key) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane >= static_cast<int32_t>(key - p.q0 - g * kLanes);
}

// S^T -> exp(scale * (S^T - maximum)), 0 where a query does not see a key. The maxima and sums of each query.
SPU_INLINE void softmax_of_panel(const QueryPanel& p, float scale, float* s, vf (&most)[kNV], vf (&sum)[kNV]) {
  const vf lowest = O::splat(-INFINITY);
#pragma GCC unroll 4
  for (int g = 0; g < kNV; ++g) {
    vf top = lowest, total = {};
    float* c = s + g * kLanes;
    for (int64_t key = 0; key < p.whole; ++key) {
      const vf z = load(c + key * kNR);
      top = z > top ? z : top;
    }
    for (int64_t key = p.whole; key < p.keys; ++key) {
      const vf z = sees(p, g, key) ? load(c + key * kNR) : lowest;
      store(c + key * kNR, z);
      top = z > top ? z : top;
    }
    for (int64_t key = 0; key < p.keys; ++key) {
      const vf e = math::exp_or_zero<vf>((load(c + key * kNR) - top) * scale);
      store(c + key * kNR, e);
      total += e;
    }
    most[g] = top, sum[g] = total;
  }
}

// out [valid queries, head_dim], rows `row` apart, = c [head_dim, kNR] transposed, each query's column times factor.
template <class T>
static void store_turned(const QueryPanel& p, int64_t head_dim, const float* c, const vf (&factor)[kNV], T* out,
                         int64_t row) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
#pragma GCC unroll 4
    for (int g = 0; g < kNV; ++g) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = i < left ? load(c + (d + i) * kNR + g * kLanes) * factor[g] : vf{};
      transpose(r);
      const int64_t rows = least(kLanes, p.valid - g * kLanes);
      for (int64_t i = 0; i < rows; ++i) store_upto(out + (g * kLanes + i) * row + d, r[i], left);
    }
  }
}

// out: a result tensor's first element of this head, whose tokens are `row` elements apart.
static void store_queries(Type type, const QueryPanel& p, int64_t head_dim, const float* c, const vf (&factor)[kNV],
                          void* out, int64_t row) {
  const int64_t at = p.q0 * row;
  if (type == Type::fp16) return store_turned(p, head_dim, c, factor, static_cast<Fp16*>(out) + at, row);
  if (type == Type::bf16) return store_turned(p, head_dim, c, factor, static_cast<Bf16*>(out) + at, row);
  store_turned(p, head_dim, c, factor, static_cast<float*>(out) + at, row);
}

// A contiguous result [batch, tokens, heads, head_dim]: where one head begins.
SPU_INLINE void* result_of(const cpu::Attention& a, void* data, int64_t batch, int64_t tokens, int64_t heads,
                           int64_t head) {
  return const_cast<void*>(offset_by(data, a.type, (batch * tokens * heads + head) * a.head_dim));
}

template <int W>
SPU_INLINE int64_t panels_floats(int64_t rows, int64_t k) {
  return ceil_div(rows, W) * panel_stride<W>(k);
}

SPU_INLINE int64_t score_floats(const cpu::Attention& a) {
  return ceil_div(a.keys, kMR) * kMR * kNR;
}

SPU_INLINE int64_t turned_floats(const cpu::Attention& a) {
  return ceil_div(a.head_dim, kMR) * kMR * kNR;
}

static void attention(const cpu::Attention& a, int64_t begin, int64_t end) {
  const int64_t panels = ceil_div(a.queries, kNR), each = ceil_div(panels, a.query_chunks);
  const int64_t k_floats = panels_floats<kMR>(a.keys, a.head_dim), v_floats = panels_floats<kMR>(a.head_dim, a.keys);
  const int64_t q_floats = panel_stride<kNR>(a.head_dim);
  float* k = cpu::workspace(cpu::kLocalB, k_floats + v_floats + q_floats + score_floats(a) + turned_floats(a));
  float *v = k + k_floats, *q = v + v_floats, *s = q + q_floats, *o = s + score_floats(a);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.query_chunks, pair = task / a.query_chunks;
    const int64_t batch = pair / a.heads, head = pair % a.heads, kv_head = head / (a.heads / a.kv_heads);
    if (packed != batch * a.kv_heads + kv_head) {
      pack_panels<kMR>(k, head_of(a, a.k, batch, kv_head), a.keys, a.head_dim);
      pack_panels<kMR>(v, turned(head_of(a, a.v, batch, kv_head)), a.head_dim, a.keys);
      packed = batch * a.kv_heads + kv_head;
    }
    const cpu::Operand queries = head_of(a, a.q, batch, head);
    void* out = result_of(a, a.out, batch, a.queries, a.heads, head);
    for (int64_t i = chunk * each; i < least(panels, (chunk + 1) * each); ++i) {
      const QueryPanel p = query_panel(a, i * kNR);
      pack<kNR, false>(q, queries, p.q0, a.queries, 0, a.head_dim);
      panels_times(k, p.keys, a.head_dim, q, s);
      vf most[kNV], sum[kNV], inverse[kNV];
      softmax_of_panel(p, a.scale, s, most, sum);
      // V^T's panels hold all keys; those of later keys are left out.
      for (int64_t d = 0; d < a.head_dim; d += kMR) {
        micro_kernel<false>(p.keys, v + d / kMR * panel_stride<kMR>(a.keys), s, o + d * kNR, kNR, false);
      }
      float *lse = a.lse + pair * a.queries + p.q0, sums[kNR], tops[kNR];
#pragma GCC unroll 4
      for (int g = 0; g < kNV; ++g) {
        inverse[g] = 1.0f / sum[g];
        store(sums + g * kLanes, sum[g]), store(tops + g * kLanes, most[g]);
      }
      for (int64_t j = 0; j < p.valid; ++j) lse[j] = a.scale * tops[j] + logf(sums[j]);
      store_queries(a.type, p, a.head_dim, o, inverse, out, a.heads * a.head_dim);
    }
  }
}

// The operands of the backward of one key and value head.
struct BackwardPanels {
  float *k, *v, *k_turned;    // A panels: keys x head_dim twice, head_dim x keys
  float *dk, *dv;             // [keys rounded up, columns], sums over the queries
  float *q, *dout;            // B panels of one query panel: head_dim x queries
  float *q_rows, *dout_rows;  // the same with the queries as the inner dimension: queries x head_dim
  float *p, *ds, *dq;         // [keys rounded up, kNR] twice, [head_dim rounded up, kNR]
  int64_t columns;            // head_dim rounded up to kNR
};

static BackwardPanels backward_panels(const cpu::Attention& a) {
  const int64_t columns = ceil_div(a.head_dim, kNR) * kNR, rows = ceil_div(a.keys, kMR) * kMR;
  const int64_t keys = panels_floats<kMR>(a.keys, a.head_dim), sums = rows * columns;
  const int64_t panel = panel_stride<kNR>(a.head_dim), inner = columns / kNR * panel_stride<kNR>(kNR);
  const int64_t sizes[] = {keys,
                           keys,
                           panels_floats<kMR>(a.head_dim, a.keys),
                           sums,
                           sums,
                           panel,
                           panel,
                           inner,
                           inner,
                           score_floats(a),
                           score_floats(a),
                           turned_floats(a)};
  int64_t total = 0;
  for (const int64_t size : sizes) total += (size + 15) / 16 * 16;
  float* at = cpu::workspace(cpu::kLocalB, total);
  BackwardPanels b = {};
  float** const fields[] = {&b.k,    &b.v,      &b.k_turned,  &b.dk, &b.dv, &b.q,
                            &b.dout, &b.q_rows, &b.dout_rows, &b.p,  &b.ds, &b.dq};
  for (int i = 0; i < 12; ++i) *fields[i] = at, at += (sizes[i] + 15) / 16 * 16;
  b.columns = columns;
  return b;
}

// sum over head_dim of dout * out, a query at a time
template <class T>
static void row_products(const QueryPanel& p, int64_t head_dim, const cpu::Operand& x, const cpu::Operand& y,
                         float* out) {
  for (int64_t i = 0; i < p.valid; ++i) {
    const T* a = static_cast<const T*>(x.data) + (p.q0 + i) * x.row;
    const T* b = static_cast<const T*>(y.data) + (p.q0 + i) * y.row;
    vf sum = {};
    for_vectors(head_dim, [&](int64_t j, int64_t left)
                              SPU_LAMBDA { sum = O::fma(load_upto(a + j, left), load_upto(b + j, left), sum); });
    out[i] = sum_of(sum);
  }
}

// P^T from S^T in place, dS^T = P^T * (dP^T - delta) * scale in place of dP^T; 0 where a query does not see a key.
static void scores_backward(const QueryPanel& p, float scale, const float* lse, const float* delta, float* s,
                            float* dp) {
  const int64_t rounded = ceil_div(p.keys, kMR) * kMR;
#pragma GCC unroll 4
  for (int g = 0; g < kNV; ++g) {
    const vf l = load(lse + g * kLanes), d = load(delta + g * kLanes);
    float *c = s + g * kLanes, *dc = dp + g * kLanes;
    for (int64_t key = 0; key < p.keys; ++key) {
      vf e = math::exp_or_zero<vf>(O::fma(load(c + key * kNR), O::splat(scale), -l));
      vf ds = e * (load(dc + key * kNR) - d) * scale;
      if (key >= p.whole) {
        const vi seen = sees(p, g, key);
        e = seen ? e : vf{}, ds = seen ? ds : vf{};
      }
      store(c + key * kNR, e), store(dc + key * kNR, ds);
    }
    for (int64_t key = p.keys; key < rounded; ++key) store(c + key * kNR, vf{}), store(dc + key * kNR, vf{});
  }
}

// sums [keys, columns] += weights^T [keys, queries] rows [queries, head_dim]
SPU_INLINE void add_to_keys(const QueryPanel& p, const BackwardPanels& b, const float* weights, const float* rows,
                            float* sums) {
  for (int64_t d = 0; d < b.columns; d += kNR, rows += panel_stride<kNR>(kNR)) {
    for (int64_t key = 0; key < p.keys; key += kMR) {
      add_rows_times(p.valid, weights + key * kNR, rows, sums + key * b.columns + d, b.columns);
    }
  }
}

static void query_panel_backward(const cpu::Attention& a, const BackwardPanels& b, const QueryPanel& p, int64_t batch,
                                 int64_t head) {
  const cpu::Operand q = head_of(a, a.q, batch, head), dout = head_of(a, a.dout, batch, head);
  const cpu::Operand out = head_of(a, a.saved_out, batch, head);
  float lse[kNR] = {}, delta[kNR] = {};
  memcpy(lse, a.lse + (batch * a.heads + head) * a.queries + p.q0, sizeof(float) * static_cast<size_t>(p.valid));
  if (a.type == Type::fp16) {
    row_products<Fp16>(p, a.head_dim, dout, out, delta);
  } else if (a.type == Type::bf16) {
    row_products<Bf16>(p, a.head_dim, dout, out, delta);
  } else {
    row_products<float>(p, a.head_dim, dout, out, delta);
  }
  pack<kNR, false>(b.q, q, p.q0, a.queries, 0, a.head_dim);
  pack<kNR, false>(b.dout, dout, p.q0, a.queries, 0, a.head_dim);
  for (int64_t d = 0; d < a.head_dim; d += kNR) {
    const int64_t at = d / kNR * panel_stride<kNR>(kNR);
    pack<kNR, false>(b.q_rows + at, turned(q), d, a.head_dim, p.q0, p.valid);
    pack<kNR, false>(b.dout_rows + at, turned(dout), d, a.head_dim, p.q0, p.valid);
  }
  panels_times(b.k, p.keys, a.head_dim, b.q, b.p);
  panels_times(b.v, p.keys, a.head_dim, b.dout, b.ds);
  scores_backward(p, a.scale, lse, delta, b.p, b.ds);
  add_to_keys(p, b, b.p, b.dout_rows, b.dv);
  add_to_keys(p, b, b.ds, b.q_rows, b.dk);
  vf one[kNV];
  for (int g = 0; g < kNV; ++g) one[g] = O::splat(1.0f);
  for (int64_t d = 0; d < a.head_dim; d += kMR) {
    micro_kernel<false>(p.keys, b.k_turned + d / kMR * panel_stride<kMR>(a.keys), b.ds, b.dq + d * kNR, kNR, false);
  }
  store_queries(a.type, p, a.head_dim, b.dq, one, result_of(a, a.dq, batch, a.queries, a.heads, head),
                a.heads * a.head_dim);
}

// A contiguous result's rows [keys, head_dim] of one head from sums [keys, columns].
template <class T>
static void store_keys(const cpu::Attention& a, const float* sums, int64_t columns, void* data) {
  T* out = static_cast<T*>(data);
  for (int64_t key = 0; key < a.keys; ++key) {
    for_vectors(a.head_dim, [&](int64_t j, int64_t left) SPU_LAMBDA {
      store_upto(out + key * a.kv_heads * a.head_dim + j, load_upto(sums + key * columns + j, left), left);
    });
  }
}

static void attention_backward(const cpu::Attention& a, int64_t begin, int64_t end) {
  const BackwardPanels b = backward_panels(a);
  const size_t sums = sizeof(float) * static_cast<size_t>(ceil_div(a.keys, kMR) * kMR * b.columns);
  const auto store_head = a.type == Type::fp16   ? store_keys<Fp16>
                          : a.type == Type::bf16 ? store_keys<Bf16>
                                                 : store_keys<float>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / a.kv_heads, kv_head = task % a.kv_heads, group = a.heads / a.kv_heads;
    const cpu::Operand k = head_of(a, a.k, batch, kv_head);
    pack_panels<kMR>(b.k, k, a.keys, a.head_dim);
    pack_panels<kMR>(b.v, head_of(a, a.v, batch, kv_head), a.keys, a.head_dim);
    pack_panels<kMR>(b.k_turned, turned(k), a.head_dim, a.keys);
    memset(b.dk, 0, sums), memset(b.dv, 0, sums);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t q0 = 0; q0 < a.queries; q0 += kNR) query_panel_backward(a, b, query_panel(a, q0), batch, head);
    }
    store_head(a, b.dk, b.columns, result_of(a, a.dk, batch, a.keys, a.kv_heads, kv_head));
    store_head(a, b.dv, b.columns, result_of(a, a.dv, batch, a.keys, a.kv_heads, kv_head));
  }
}

}  // namespace spu::SPU_ISA_NS
