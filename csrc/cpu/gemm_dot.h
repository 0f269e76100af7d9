// Few rows, both operands contiguous along k: dot products straight from storage. Packing would cost as much as the
// product, and four times kLanes partial sums round less than one long chain does.
// Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/gemm_epilogue.h"
#include "cpu/transpose.h"

namespace spu {
namespace SPU_ISA_NS {

constexpr int64_t kDotRows = 4, kDotColumns = 64;

// A dot product in lanes, which are still to be added.
template <class T>
SPU_INLINE vf dot_lanes(const float* a, const T* b, int64_t k) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = O::fma(load(a + i + j * kLanes), load(b + i + j * kLanes), sum[j]);
  }
  for (; i + kLanes <= k; i += kLanes) sum[0] = O::fma(load(a + i), load(b + i), sum[0]);
  if (i < k) sum[1] = O::fma(load_some(a + i, k - i), load_some(b + i, k - i), sum[1]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
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
    for (int64_t l = 0; l < some; ++l) {
      for (int64_t i = 0; i < m; ++i) r[i][l] = dot_lanes(g.a + i * k, b + (j0 + j + l) * operand.col, k);
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t l = some; l < kLanes; ++l) r[i][l] = vf{};
      transpose(r[i]);  // the lanes of all columns are added at once, in the order of sum_of
#pragma GCC unroll 4
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) r[i][l] += r[i][l + half];
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
  cpu::parallel(groups, threads, dot_task, &g);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
