// The matrix product: panels packed to fp32 (or to pairs of bf16), cache blocking, a register-blocked micro-kernel,
// epilogues on blocks that are still in the cache.
//
// Blocking after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008). A is packed once
// and shared by the threads; each task packs its own columns of B once. The order of additions into an element of C
// depends on k alone, so that the result does not depend on the number of threads.
// Included in the namespace of an instruction set, which defines SPU_MR and SPU_NV (the micro-tile: rows, vectors).
#pragma once

#include "cpu/gemm_dot.h"
#include "cpu/gemm_epilogue.h"
#include "cpu/gemm_micro.h"
#include "cpu/gemm_pack.h"

namespace spu::SPU_ISA_NS {

// A k-block of a B panel (kKC slots x kNR) stays in L1, or nearly: 256 slots of 32 columns are 32 KB. L2 holds the
// k-block of a task's columns (kKC x kTaskColumns, 256 KB with AVX-512), the kFinishRows of A that it meets, and the C
// block that it makes (kMC x kTaskColumns). Where L2 has 1 MB and more (AVX-512), C has many rows: each of them saves a
// line of B from L3. Results are finished kFinishRows at a time, while they are hot.
constexpr bool kRowsFirst = kNR >= 32;  // a panel of A meets all panels of B, or the other way round
constexpr int64_t kKC = kNR >= 32 ? 256 : 384;
constexpr int64_t kFinishRows = 120;
constexpr int64_t kMC = kRowsFirst ? 518 : kFinishRows;
constexpr int64_t kTaskColumns = cpu::kStatColumns;
// Bounds of one packing: kKS slots along k, and 2M floats (8 MB) of A in all. Where k takes several such
// ranges, C waits in fp32 between them, kNS of its columns at a time.
constexpr int64_t kKS = 2048;
constexpr int64_t kNS = 4096;
constexpr int64_t kSharedFloats = int64_t{1} << 21;
// Slots along k that the panels of A pack in turn.
constexpr int64_t kTurn = 16;
// Panels of A that a thread packs at a time: neighbours share lines.
constexpr int64_t kLeastPanels = 4;
// Below so many multiply-adds waking other threads costs more than it saves: torch's, and those of waiting stages.
constexpr int64_t kParallelWork = int64_t{1} << 18, kSharedWork = int64_t{1} << 22;

// One product, and the super-block of it that is being worked on. Lengths along k are in slots.
struct Gemm {
  const cpu::Product* p;
  const cpu::Epilogue* e;
  TileEpilogue epilogue;
  const char* target;  // the matrix that the epilogue reads or writes, or null
  int64_t target_size;
  int64_t k, per;  // slots of the whole product; values in a slot

  int64_t n0, ns;  // columns of the super-block
  int64_t m0, ms;  // its rows
  int64_t mr;      // of a panel of A, at most kMR: as equal as they can be, for rows of padding cost as much as others
  int64_t k0, ks;  // its k range
  int64_t kc;      // k-block
  float* packed_a;
  float* shared_c;  // [ms rounded up, shared_ldc] when k takes several super-blocks, else null
  int64_t shared_ldc;
  int64_t unit, units, row_tasks, task_rows;  // a task: some units of columns, and rows

  int64_t products() const { return p->b2 && !p->a2 ? 2 : 1; }  // C and its twin, side by side
  int64_t k_blocks() const { return ceil_div(ks, kc); }
  int64_t a_panels() const { return ceil_div(ms, mr); }
  int64_t whole_panels(int64_t rows) const { return rows / mr * mr; }
  bool last() const { return k0 + ks == k; }
};

SPU_INLINE cpu::Operand transposed(const cpu::Operand& x) {
  return {x.data, x.type, x.col, x.row};
}

// Slots [k, k + kc) of W rows of an operand, or of two that follow each other along k (the second from values[split]).
template <int W, bool Pairs>
static void pack_slots(const Gemm& g, float* out, const cpu::Operand& one, const cpu::Operand* two, int64_t r0,
                       int64_t rows, int64_t k, int64_t kc) {
  const int64_t split = g.p->k, begin = k * g.per;
  const int64_t end = least(begin + kc * g.per, two ? 2 * split : split), middle = least(split, end);
  if (begin < split) pack<W, Pairs>(out, one, r0, rows, begin, middle - begin);
  if (end > split) {
    const int64_t from = begin > split ? begin : split;
    pack<W, Pairs>(out + (from - begin) / g.per * W, *two, r0, rows, from - split, end - from);
  }
}

template <bool Pairs>
static void pack_a(void* context, int64_t begin, int64_t end) {
  const Gemm& g = *static_cast<Gemm*>(context);
  const int64_t stride = panel_stride<kMR>(g.kc);
  // Where A's rows are neighbours in memory, a line holds values of several panels: these take a few k each in turn,
  // while the lines are in the cache. (Panels one after the other: a tenth of a weight gradient's time on Cascade
  // Lake.)
  const bool along_rows = g.p->a.row == 1 && g.p->a.col != 1;
  const int64_t turn = along_rows ? kTurn : g.kc;
  for (int64_t q = 0; q < g.k_blocks(); ++q) {
    const int64_t kc = least(g.kc, g.ks - q * g.kc);
    for (int64_t k = 0; k < kc; k += turn) {
      for (int64_t p = begin; p < end; ++p) {
        pack_slots<kMR, Pairs>(g, g.packed_a + (q * g.a_panels() + p) * stride + k * kMR, g.p->a, g.p->a2,
                               g.m0 + p * g.mr, g.m0 + g.ms, g.k0 + q * g.kc + k, least(turn, kc - k));
      }
    }
  }
}

// One task's columns [j0, j0 + columns) of the super-block: `panels` of each product and k-block, and where they go.
struct TaskColumns {
  float* packed;
  int64_t j0, columns, panels;
};

// One k-block of a task's columns. Where they are neighbours in memory the panels take a few k each in turn: a row of B
// may be a page of its own.
template <bool Pairs>
static void pack_b(const Gemm& g, const TaskColumns& t, int64_t q, float* out) {
  const int64_t stride = panel_stride<kNR>(g.kc), products = g.products();
  const int64_t k = g.k0 + q * g.kc, kc = least(g.kc, g.ks - q * g.kc);
  for (int64_t s = 0; s < products; ++s) {
    const cpu::Operand b = transposed(s ? *g.p->b2 : g.p->b), next = transposed(g.p->a2 ? *g.p->b2 : g.p->b);
    const int64_t turn = b.row == 1 && b.col != 1 ? kTurn : kc, column = g.n0 + t.j0;
    for (int64_t done = 0; done < kc; done += turn) {
      for (int64_t p = 0; p < t.panels; ++p) {
        pack_slots<kNR, Pairs>(g, out + p * stride + done * kNR, b, g.p->a2 ? &next : nullptr, column + p * kNR,
                               column + t.columns, k + done, least(turn, kc - done));
      }
    }
    out += t.panels * stride;
  }
}

// The lines that the epilogue of a micro-tile will touch, asked for before they are needed.
SPU_INLINE void prefetch_target(const Gemm& g, int64_t row, int64_t column, int64_t rows) {
  const int64_t length = row_length(*g.p);
  const char* at = g.target + ((g.p->c_row + row) * length + g.p->c_column + column) * g.target_size;
  const int64_t bytes = kNR * g.target_size, stride = length * g.target_size;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + i * stride + b, 0, 2);
  }
}

// Rows of a task: [i0, i1) of the super-block, and where their sums are.
struct TaskRows {
  int64_t i0, i1;
  float* c;
  int64_t ldc;
};

// Rows [r0, r1) by one k-block of the packed columns.
template <bool Pairs>
SPU_INLINE void chunk(const Gemm& g, const TaskColumns& t, const TaskRows& rows, int64_t q, const float* packed,
                      int64_t r0, int64_t r1) {
  const int64_t a_stride = panel_stride<kMR>(g.kc), b_stride = panel_stride<kNR>(g.kc);
  const int64_t kc = least(g.kc, g.ks - q * g.kc), b_panels = g.products() * t.panels, a_panels = (r1 - r0) / g.mr;
  const bool add = q > 0 || g.k0 > 0, prefetch = q + 1 == g.k_blocks() && g.last() && g.target;
  const MicroKernel micro = kMicroKernels<Pairs>[g.mr - 1];
  const float* first = g.packed_a + (q * g.a_panels() + r0 / g.mr) * a_stride;
  const int64_t outer = kRowsFirst ? a_panels : b_panels, inner = kRowsFirst ? b_panels : a_panels;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t n = 0; n < inner; ++n) {
      const int64_t ip = kRowsFirst ? o : n, jp = kRowsFirst ? n : o, i = r0 + ip * g.mr;
      if (prefetch) prefetch_target(g, g.m0 + i, g.n0 + t.j0 + jp * kNR, least(g.mr, g.ms - i));
      micro(kc, first + ip * a_stride, packed + jp * b_stride, rows.c + (i - rows.i0) * rows.ldc + jp * kNR, rows.ldc,
            add);
    }
  }
}

// A block of rows (multiples of kMR) by one task's columns, all k-blocks. The task's first block packs them as it goes;
// if others follow, each k-block has a place of its own.
template <bool Pairs>
static void row_block(const Gemm& g, const TaskColumns& t, const TaskRows& rows, bool first, bool only) {
  const int64_t block = g.products() * t.panels * panel_stride<kNR>(g.kc), finished = g.whole_panels(kFinishRows);
  for (int64_t q = 0; q < g.k_blocks(); ++q) {
    float* packed = t.packed + (only ? 0 : q * block);
    if (first) pack_b<Pairs>(g, t, q, packed);
    for (int64_t r0 = rows.i0; r0 < rows.i1; r0 += finished) {
      const int64_t r1 = least(r0 + finished, rows.i1);
      chunk<Pairs>(g, t, rows, q, packed, r0, r1);
      if (q + 1 < g.k_blocks() || !g.last()) continue;
      const float* c = rows.c + (r0 - rows.i0) * rows.ldc;
      const int64_t row = g.p->c_row + g.m0 + r0, column = g.p->c_column + g.n0 + t.j0;
      g.epilogue(*g.e,
                 {c, c + t.panels * kNR, rows.ldc, row, column, least(r1, g.ms) - r0, t.columns, row_length(*g.p)});
    }
  }
}

// One task: units [u0, u1) of the columns, some rows.
template <bool Pairs>
static void run_task(const Gemm& g, int64_t u0, int64_t u1, int64_t rows_from) {
  TaskColumns t = {};
  t.j0 = u0 * g.unit;
  t.columns = least(u1 * g.unit, g.ns) - t.j0;
  t.panels = ceil_div(t.columns, kNR);
  const int64_t r0 = rows_from, r1 = least(r0 + g.task_rows, g.a_panels() * g.mr);
  const int64_t blocks = ceil_div(r1 - r0, g.whole_panels(kMC));
  const int64_t most = ceil_div(ceil_div(r1 - r0, g.mr), blocks) * g.mr;
  const int64_t columns = g.products() * t.panels * kNR;
  const int64_t packed = g.products() * t.panels * panel_stride<kNR>(g.kc);
  t.packed = cpu::workspace(cpu::kLocalB, (blocks > 1 ? g.k_blocks() : 1) * packed);
  float* c = g.shared_c ? nullptr : cpu::workspace(cpu::kLocalC, most * columns);
  for (int64_t i = r0; i < r1; i += most) {
    TaskRows rows = {i, least(i + most, r1), c, columns};
    if (g.shared_c) rows.ldc = g.shared_ldc, rows.c = g.shared_c + i * g.shared_ldc + g.products() * t.j0;
    row_block<Pairs>(g, t, rows, i == r0, blocks == 1);
  }
}

// Units [begin, end) of the columns, counted through the row tasks, in tasks of about equal length.
template <bool Pairs>
static void run_tasks(void* context, int64_t begin, int64_t end) {
  const Gemm& g = *static_cast<Gemm*>(context);
  const int64_t most = kTaskColumns / g.products() / g.unit;
  while (begin < end) {
    const int64_t row = begin / g.units, first = row * g.units, last = least(end, first + g.units);
    const int64_t each = ceil_div(last - begin, ceil_div(last - begin, most));
    for (; begin < last; begin += each) {
      run_task<Pairs>(g, begin - first, least(begin + each, last) - first, row * g.task_rows);
    }
    begin = last;
  }
}

// k = 0: every accumulator is zero.
static void empty_sums(const cpu::Product& p, const cpu::Epilogue& e) {
  alignas(64) float zeros[kTaskColumns] = {};
  const TileEpilogue epilogue = choose_epilogue(e);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; j += kTaskColumns) {
      const int64_t columns = least(kTaskColumns, p.n - j);
      epilogue(e, {zeros, zeros, kTaskColumns, p.c_row + i, p.c_column + j, 1, columns, row_length(p)});
    }
  }
}

// Splits the columns, and the rows only where the threads could not take turns at the columns alone.
static void plan_tasks(Gemm& g, int64_t threads) {
  g.unit = g.e->kind == cpu::Epilogue::softmax_stats ? kTaskColumns / g.products() : kNR;
  g.units = ceil_div(g.ns, g.unit);
  const bool whole = threads == 1 || g.units >= 2 * threads || g.e->column_sums;
  g.row_tasks = whole ? 1 : least(ceil_div(2 * threads, g.units), g.a_panels());
  g.task_rows = ceil_div(g.a_panels(), g.row_tasks) * g.mr;
  g.row_tasks = ceil_div(g.a_panels() * g.mr, g.task_rows);
}

template <bool Pairs>
static void super_block(Gemm& g, int64_t threads) {
  g.kc = ceil_div(ceil_div(g.ks, ceil_div(g.ks, kKC)), kLanes) * kLanes;
  g.packed_a = cpu::workspace(cpu::kSharedA, g.k_blocks() * g.a_panels() * panel_stride<kMR>(g.kc));
  plan_tasks(g, threads);
  const int64_t tasks = g.units * g.row_tasks;
  if (threads == 1) {
    pack_a<Pairs>(&g, 0, g.a_panels());
    run_tasks<Pairs>(&g, 0, tasks);
  } else {
    cpu::parallel({g.a_panels(), threads, kLeastPanels}, pack_a<Pairs>, &g);
    cpu::parallel({tasks, threads}, run_tasks<Pairs>, &g);
  }
}

template <bool Pairs>
static void multiply(const cpu::Product& p, const cpu::Epilogue& e, int64_t threads) {
  Gemm g = {};
  g.p = &p, g.e = &e, g.epilogue = choose_epilogue(e);
  if (e.kind == cpu::Epilogue::main_grad_add) {
    g.target = reinterpret_cast<const char*>(e.main_grad), g.target_size = 4;
  } else if (e.kind == cpu::Epilogue::store || e.kind == cpu::Epilogue::softmax_grad) {
    g.target = static_cast<const char*>(e.out), g.target_size = e.out_type == Type::fp32 ? 4 : 2;
  } else if (e.kind == cpu::Epilogue::derivative || e.kind == cpu::Epilogue::gated_derivative) {
    g.target = static_cast<const char*>(e.saved), g.target_size = e.out_type == Type::fp32 ? 4 : 2;
  }
  g.per = Pairs ? 2 : 1;
  g.k = ceil_div(p.a2 ? 2 * p.k : p.k, g.per);
  const int64_t most_k = least(g.k, kKS);
  const int64_t most_m = least(p.m, ceil_div(kSharedFloats / most_k, kMR) * kMR);
  const int64_t most_n = g.k > kKS ? least(p.n, kNS) : p.n;
  if (g.k > kKS) {
    g.shared_ldc = g.products() * ceil_div(most_n, kNR) * kNR;
    g.shared_c = cpu::workspace(cpu::kSharedC, ceil_div(most_m, kMR) * kMR * g.shared_ldc);
  }
  for (g.n0 = 0; g.n0 < p.n; g.n0 += most_n) {
    g.ns = least(most_n, p.n - g.n0);
    for (g.m0 = 0; g.m0 < p.m; g.m0 += most_m) {
      g.ms = least(most_m, p.m - g.m0);
      g.mr = ceil_div(g.ms, ceil_div(g.ms, kMR));
      for (g.k0 = 0; g.k0 < g.k; g.k0 += kKS) {
        g.ks = least(kKS, g.k - g.k0);
        super_block<Pairs>(g, threads);
      }
    }
  }
}

// The epilogue alone, for rows [begin, end), on their sums c and the twin's that another made.
static void finish(const cpu::Epilogue& e, const float* c, const float* c2, int64_t n, int64_t begin, int64_t end) {
  choose_epilogue(e)(e, {c, c2, n, begin, 0, end - begin, n, n});
}

static void gemm(const cpu::Product& p, const cpu::Epilogue& e) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return empty_sums(p, e);
  const int64_t threads = cpu::threads_for(p, kParallelWork, kSharedWork);
  if (wants_dots(p, e)) return few_rows(p, e, threads);
#if defined(SPU_BF16_DOT)
  // A chained product needs its second half to begin at a whole slot.
  if (p.a.type == Type::bf16 && (!p.a2 || p.k % 2 == 0)) return multiply<true>(p, e, threads);
#endif
  multiply<false>(p, e, threads);
}

}  // namespace spu::SPU_ISA_NS
