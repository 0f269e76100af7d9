// The matrix product: panels packed to fp32, cache blocking, a register-blocked micro-kernel, epilogues on hot tiles.
//
// Blocking after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008). A is packed once
// and shared by the threads; each task packs its own columns of B once. The order of additions into an element of C
// depends on k alone, so that the result does not depend on the number of threads.
// Included in the namespace of an instruction set, which defines SPU_MR and SPU_NV (the micro-tile: rows, vectors).
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/gemm_epilogue.h"
#include "cpu/gemm_pack.h"

namespace spu {
namespace SPU_ISA_NS {

constexpr int kMR = SPU_MR, kNV = SPU_NV, kNR = SPU_NV * kLanes;
// A k-block of a B panel (kKC x kNR floats) stays in L1, an A block (kMC x kKC) in L2.
constexpr int64_t kKC = 384;
constexpr int64_t kMC = 120 / kMR * kMR;
constexpr int64_t kTaskColumns = 256;
// Bounds of what is packed at a time: kKS along k, and 2M floats (8 MB) of A in all.
constexpr int64_t kKS = 2048;
constexpr int64_t kSharedFloats = int64_t{1} << 21;
// Below this many multiply-adds waking other threads costs more than it saves.
constexpr int64_t kParallelWork = int64_t{1} << 18;

SPU_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
SPU_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// c [kMR, kNR] (+)= a panel (kMR x kc) times b panel (kc x kNR); `add` loads c first.
__attribute__((noinline)) static void micro_kernel(int64_t kc, const float* a, const float* b, float* c, int64_t ldc,
                                                   bool add) {
  vf acc[kMR][kNV];
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) acc[i][j] = vf{};
  }
  for (int64_t k = 0; k < kc; ++k) {
    vf bv[kNV];
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i) {
      const vf av = O::splat(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) acc[i][j] = O::fma(av, bv[j], acc[i][j]);
    }
    a += kMR;
    b += kNR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) {
      float* p = c + i * ldc + j * kLanes;
      store(p, add ? load(p) + acc[i][j] : acc[i][j]);
    }
  }
}

// One product, and the super-block of it that is being worked on.
struct Gemm {
  int64_t m, n, k;
  const cpu::Operand *a, *b;
  const cpu::Epilogue* e;
  TileEpilogue epilogue;

  int64_t m0, ms;  // rows of the super-block
  int64_t k0, ks;  // its k range
  int64_t kc;      // k-block
  float* packed_a;
  float* shared_c;  // [ms rounded up, ldc] when k takes several super-blocks, else null
  int64_t shared_ldc;
  int64_t task_columns, column_tasks, task_rows;  // the grid of tasks

  int64_t k_blocks() const { return ceil_div(ks, kc); }
  int64_t a_panels() const { return ceil_div(ms, kMR); }
  bool last() const { return k0 + ks == k; }
};

static void pack_a(void* context, int64_t begin, int64_t end) {
  const Gemm& g = *static_cast<Gemm*>(context);
  const int64_t stride = panel_stride<kMR>(g.kc);
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t q = 0; q < g.k_blocks(); ++q) {
      const int64_t k = q * g.kc;
      pack<kMR>(g.packed_a + (q * g.a_panels() + p) * stride, g.a->type, g.a->data, g.a->row, g.a->col, g.m0 + p * kMR,
                g.m0 + g.ms, g.k0 + k, least(g.kc, g.ks - k));
    }
  }
}

// Rows [i0, i1) of the super-block (multiples of kMR) by one task's packed columns, all k-blocks.
static void row_block(const Gemm& g, const float* packed_b, float* local_c, int64_t i0, int64_t i1, int64_t j0,
                      int64_t columns) {
  const int64_t a_stride = panel_stride<kMR>(g.kc), b_stride = panel_stride<kNR>(g.kc);
  const int64_t b_panels = ceil_div(columns, kNR), blocks = g.k_blocks();
  alignas(64) float hot[kMR * kNR];
  for (int64_t q = 0; q < blocks; ++q) {
    const int64_t kc = least(g.kc, g.ks - q * g.kc);
    const bool add = q > 0 || g.k0 > 0, finish = q + 1 == blocks && g.last();
    for (int64_t jp = 0; jp < b_panels; ++jp) {
      const float* b = packed_b + (q * b_panels + jp) * b_stride;
      for (int64_t i = i0; i < i1; i += kMR) {
        const float* a = g.packed_a + (q * g.a_panels() + i / kMR) * a_stride;
        float* c = hot;
        int64_t ldc = kNR;
        if (g.shared_c) {
          ldc = g.shared_ldc;
          c = g.shared_c + i * ldc + j0 + jp * kNR;
        } else if (blocks > 1) {
          ldc = b_panels * kNR;
          c = local_c + (i - i0) * ldc + jp * kNR;
        }
        micro_kernel(kc, a, b, c, ldc, add);
        if (finish) {
          g.epilogue(*g.e,
                     {c, ldc, g.m0 + i, j0 + jp * kNR, least(kMR, g.ms - i), least(kNR, columns - jp * kNR), g.n});
        }
      }
    }
  }
}

static void run_tasks(void* context, int64_t begin, int64_t end) {
  const Gemm& g = *static_cast<Gemm*>(context);
  const int64_t b_stride = panel_stride<kNR>(g.kc);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t j0 = t % g.column_tasks * g.task_columns, columns = least(g.task_columns, g.n - j0);
    const int64_t r0 = t / g.column_tasks * g.task_rows, r1 = least(r0 + g.task_rows, g.ms);
    const int64_t b_panels = ceil_div(columns, kNR), blocks = g.k_blocks();
    float* packed_b = cpu::workspace(cpu::kLocalB, blocks * b_panels * b_stride);
    for (int64_t q = 0; q < blocks; ++q) {
      const int64_t kc = least(g.kc, g.ks - q * g.kc);
      for (int64_t p = 0; p < b_panels; ++p) {
        pack<kNR>(packed_b + (q * b_panels + p) * b_stride, g.b->type, g.b->data, g.b->col, g.b->row, j0 + p * kNR,
                  j0 + columns, g.k0 + q * g.kc, kc);
      }
    }
    float* local_c = nullptr;
    if (blocks > 1 && !g.shared_c) local_c = cpu::workspace(cpu::kLocalC, kMC * b_panels * kNR);
    for (int64_t i = r0; i < r1; i += kMC) row_block(g, packed_b, local_c, i, least(i + kMC, r1), j0, columns);
  }
}

// Few rows, both operands contiguous along k: dot products straight from storage. Packing would cost as much as the
// product, and four times kLanes partial sums round less than one long chain does.
constexpr int64_t kDotRows = 4;

template <class T>
static float dot(const float* a, const T* b, int64_t k) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = O::fma(load(a + i + j * kLanes), load(b + i + j * kLanes), sum[j]);
  }
  for (; i + kLanes <= k; i += kLanes) sum[0] = O::fma(load(a + i), load(b + i), sum[0]);
  if (i < k) sum[1] = O::fma(load_some(a + i, k - i), load_some(b + i, k - i), sum[1]);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Columns [64 begin, 64 end) of all rows; packed_a holds A as fp32 [m, k].
template <class T>
static void dot_columns(const Gemm& g, int64_t begin, int64_t end) {
  const T* b = static_cast<const T*>(g.b->data);
  alignas(64) float c[kDotRows * 64];
  for (int64_t j0 = begin * 64; j0 < end * 64; j0 += 64) {
    const int64_t columns = least(64, g.n - j0);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < g.m; ++i) c[i * 64 + j] = dot(g.packed_a + i * g.k, b + (j0 + j) * g.b->col, g.k);
    }
    g.epilogue(*g.e, {c, 64, 0, j0, g.m, columns, g.n});
  }
}

static void dot_task(void* context, int64_t begin, int64_t end) {
  const Gemm& g = *static_cast<Gemm*>(context);
  if (g.b->type == cpu::Type::fp16) return dot_columns<Fp16>(g, begin, end);
  if (g.b->type == cpu::Type::bf16) return dot_columns<Bf16>(g, begin, end);
  return dot_columns<float>(g, begin, end);
}

static void few_rows(Gemm& g, int64_t threads) {
  g.packed_a = cpu::workspace(cpu::kSharedA, g.m * g.k);
  const char* a = static_cast<const char*>(g.a->data);
  const int64_t size = g.a->type == cpu::Type::fp32 ? 4 : 2;
  for (int64_t i = 0; i < g.m; ++i) {
    convert(g.a->type, a + i * g.a->row * size, cpu::Type::fp32, g.packed_a + i * g.k, 0, g.k);
  }
  if (threads == 1) return dot_task(&g, 0, ceil_div(g.n, 64));
  cpu::parallel(ceil_div(g.n, 64), dot_task, &g);
}

// k = 0: every accumulator is zero.
static void empty_sums(const Gemm& g) {
  alignas(64) float zeros[kMR * kNR] = {};
  for (int64_t i = 0; i < g.m; i += kMR) {
    for (int64_t j = 0; j < g.n; j += kNR) {
      g.epilogue(*g.e, {zeros, kNR, i, j, least(kMR, g.m - i), least(kNR, g.n - j), g.n});
    }
  }
}

// Splits the columns, and the rows only when there are fewer column tasks than threads.
static void plan_tasks(Gemm& g, int64_t threads) {
  int64_t tasks = ceil_div(ceil_div(g.n, kTaskColumns), threads) * threads;
  g.task_columns = ceil_div(ceil_div(g.n, tasks), kNR) * kNR;
  g.column_tasks = ceil_div(g.n, g.task_columns);
  const int64_t row_tasks = g.column_tasks >= threads ? 1 : least(ceil_div(threads, g.column_tasks), g.a_panels());
  g.task_rows = ceil_div(g.a_panels(), row_tasks) * kMR;
}

static void gemm(int64_t m, int64_t n, int64_t k, const cpu::Operand& a, const cpu::Operand& b,
                 const cpu::Epilogue& e) {
  if (m == 0 || n == 0) return;
  Gemm g = {};
  g.m = m, g.n = n, g.k = k, g.a = &a, g.b = &b, g.e = &e;
  g.epilogue = choose_epilogue(e);
  if (k == 0) return empty_sums(g);

  const int64_t threads = m * n >= kParallelWork / k ? cpu::threads() : 1;
  if (m <= kDotRows && a.col == 1 && b.row == 1) return few_rows(g, threads);
  const int64_t most_k = least(k, kKS);
  const int64_t most_m = least(m, ceil_div(kSharedFloats / most_k, kMR) * kMR);
  if (k > kKS) {
    g.shared_ldc = ceil_div(n, kNR) * kNR;
    g.shared_c = cpu::workspace(cpu::kSharedC, ceil_div(most_m, kMR) * kMR * g.shared_ldc);
  }
  for (g.m0 = 0; g.m0 < m; g.m0 += most_m) {
    g.ms = least(most_m, m - g.m0);
    for (g.k0 = 0; g.k0 < k; g.k0 += kKS) {
      g.ks = least(kKS, k - g.k0);
      g.kc = ceil_div(ceil_div(g.ks, ceil_div(g.ks, kKC)), kLanes) * kLanes;
      g.packed_a = cpu::workspace(cpu::kSharedA, g.k_blocks() * g.a_panels() * panel_stride<kMR>(g.kc));
      plan_tasks(g, threads);
      const int64_t tasks = g.column_tasks * ceil_div(g.ms, g.task_rows);
      if (threads == 1) {
        pack_a(&g, 0, g.a_panels());
        run_tasks(&g, 0, tasks);
      } else {
        cpu::parallel(g.a_panels(), pack_a, &g);
        cpu::parallel(tasks, run_tasks, &g);
      }
    }
  }
}

}  // namespace SPU_ISA_NS
}  // namespace spu
