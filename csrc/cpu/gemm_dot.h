// Few rows, both operands contiguous along k: dot products straight from storage. Packing would cost as much as the
// product, and four times kLanes partial sums round less than one long chain does.
// Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/gemm_epilogue.h"
#include "cpu/transpose.h"

namespace spu::SPU_ISA_NS {

constexpr int64_t kDotRows = 4, kDotColumns = 64;

// Weights come from L3 or memory, and what they take is the time of all of it. fp32: four rows of them at once, which
// are four streams. 16 bits: the widening keeps up with one, asked for ahead. (512 x 1408 by one row: 255 -> 194 us and
// 157 -> 115 us; four streams of 16 bits took 177.)
template <class T>
constexpr int kTogether = kLanes == 16 && sizeof(T) == 4 ? 4 : 1;
constexpr int64_t kAheadBytes = 4096;

// The dot products of a with N rows of b, `next` apart, each in lanes that are still to be added.
template <int N, class T>
SPU_INLINE void dot_lanes(const float* a, const T* b, int64_t next, int64_t k, vf* out) {
  vf sum[N][4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf av = load(a + i + j * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const T* p = b + n * next + i + j * kLanes;
        if constexpr (N == 1) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
        sum[n][j] = O::fma(av, load(p), sum[n][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const T* p = b + n * next;
    int64_t rest = i;
    for (; rest + kLanes <= k; rest += kLanes) sum[n][0] = O::fma(load(a + rest), load(p + rest), sum[n][0]);
    if (rest < k) sum[n][1] = O::fma(load_some(a + rest, k - rest), load_some(p + rest, k - rest), sum[n][1]);
    out[n] = (sum[n][0] + sum[n][1]) + (sum[n][2] + sum[n][3]);
  }
}

struct FewRows {
  const cpu::Product* p;
  const cpu::Epilogue* e;
  TileEpilogue epilogue;
  const float* a;  // A as fp32 [m, k]
};

template <class T>
static void dot_tile(const FewRows& g, const cpu::Operand& operand, int64_t j0, int64_t columns, float* c) {
  const T* b = static_cast<const T*>(operand.data);
  const int64_t m = g.p->m, k = g.p->k;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t some = least(kLanes, columns - j);
    vf r[kDotRows][kLanes];  // by row and column
    constexpr int together = kTogether<T>;
    int64_t l = 0;
    for (; l + together <= some; l += together) {
      const T* at = b + (j0 + j + l) * operand.col;
      for (int64_t i = 0; i < m; ++i) dot_lanes<together>(g.a + i * k, at, operand.col, k, &r[i][l]);
    }
    for (; l < some; ++l) {
      for (int64_t i = 0; i < m; ++i) dot_lanes<1>(g.a + i * k, b + (j0 + j + l) * operand.col, 0, k, &r[i][l]);
    }
    for (int64_t i = 0; i < m; ++i) {
      for (l = some; l < kLanes; ++l) r[i][l] = vf{};
      transpose(r[i]);  // the lanes of all columns are added at once, in the order of sum_of
#pragma GCC unroll 4
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) r[i][lane] += r[i][lane + half];
      }
      store_upto(c + i * kDotColumns + j, r[i][0], some);
    }
  }
}

static void dot_any(const FewRows& g, const cpu::Operand& b, int64_t j0, int64_t columns, float* c) {
  if (b.type == Type::fp16) return dot_tile<Fp16>(g, b, j0, columns, c);
  if (b.type == Type::bf16) return dot_tile<Bf16>(g, b, j0, columns, c);
  return dot_tile<float>(g, b, j0, columns, c);
}

// Column groups [begin, end) of all rows.
static void dot_task(void* context, int64_t begin, int64_t end) {
  const FewRows& g = *static_cast<FewRows*>(context);
  alignas(64) float c[2][kDotRows * kDotColumns];
  for (int64_t j0 = begin * kDotColumns; j0 < end * kDotColumns; j0 += kDotColumns) {
    const int64_t columns = least(kDotColumns, g.p->n - j0);
    dot_any(g, g.p->b, j0, columns, c[0]);
    if (g.p->b2) dot_any(g, *g.p->b2, j0, columns, c[1]);
    g.epilogue(*g.e, {c[0], c[1], kDotColumns, g.p->c_row, g.p->c_column + j0, g.p->m, columns, row_length(*g.p)});
  }
}

static bool wants_dots(const cpu::Product& p, const cpu::Epilogue& e) {
  const bool contiguous = p.a.col == 1 && p.b.row == 1 && !p.a2 && (!p.b2 || p.b2->row == 1);
  return p.m <= kDotRows && contiguous && (e.kind == cpu::Epilogue::store || e.kind == cpu::Epilogue::gated);
}

static void few_rows(const cpu::Product& p, const cpu::Epilogue& e, int64_t threads) {
  float* a32 = cpu::workspace(cpu::kSharedA, p.m * p.k);
  const char* a = static_cast<const char*>(p.a.data);
  const int64_t size = p.a.type == Type::fp32 ? 4 : 2;
  for (int64_t i = 0; i < p.m; ++i) {
    convert(p.a.type, a + i * p.a.row * size, Type::fp32, a32 + i * p.k, 0, p.k);
  }
  FewRows g = {&p, &e, choose_epilogue(e), a32};
  const int64_t groups = ceil_div(p.n, kDotColumns);
  if (threads == 1) return dot_task(&g, 0, groups);
  cpu::parallel({groups, threads}, dot_task, &g);
}

}  // namespace spu::SPU_ISA_NS
