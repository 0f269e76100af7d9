// The matrix product on AMX tiles, for bf16 and, by exact splitting, for fp16. Included in the namespace of an
// instruction set.
//
// A and B are packed to panels of bf16 parts (gemm_amx_pack.h) by all threads and shared; the threads then divide the
// blocks of C, first by columns. fp32 sums wait in memory only where k takes several blocks. An element's additions
// have an order that depends on the product's shape alone, so that results do not depend on the number of threads.
//
// An fp16 value that is not finite has no two parts. Packing finds them before any result is written: panels of rows
// with one in A, and groups of columns with one in B, are left to the AVX-512 kernel, in which an infinity stays one.
#pragma once

#include "cpu/gemm_amx_micro.h"
#include "cpu/gemm_amx_shared.h"
#include "cpu/gemm_epilogue.h"

namespace spu::SPU_ISA_NS {

// Steps of k (32 values) that a block of B in L2 has, by parts; a task's share of B in L2; rows of C that are
// worked on while a k-block is there.
constexpr int64_t kBlockSteps[] = {48, 32}, kBlockBytes = int64_t{1} << 20, kBlockPanels = 8;
// Panels of A that are packed at a time, to the same place, where all of B is there: L2 holds what was written last,
// and a line that it does not hold takes as long to write as its values to convert.
constexpr int64_t kReusedBytes = int64_t{1} << 18;
// Bounds of one packing: steps of k, columns, bytes of A and of B. Where k takes more, C waits in fp32, kWaitingColumns
// at a time.
constexpr int64_t kMostSteps = 512, kMostColumns = 65536, kMostBytes = int64_t{1} << 25, kWaitingColumns = 4096;
constexpr int64_t kGroups = kMostColumns / cpu::kStatColumns, kMostPanels = kMostBytes / (2 * kTileValues * 2);
// Below so many multiply-adds waking other threads costs more than it saves: torch's, and those of waiting stages.
constexpr int64_t kParallelTiles = int64_t{1} << 21;
#if defined(SPU_EMULATE_AVX512)
constexpr int64_t kSharedTiles = kParallelTiles;
#else
constexpr int64_t kSharedTiles = int64_t{1} << 25;
#endif

struct TileGemm {
  const cpu::Product* p;
  const cpu::Epilogue* e;
  TileEpilogue epilogue;
  Targets targets;
  int64_t parts;     // 1 or 2
  int64_t products;  // 2 with a twin
  int64_t half;      // steps of the first product of a chain, or of the only one
  int64_t width;     // panels of B that are finished together: a group of statistics' or one
  int64_t threads;

  int64_t n0, ns, m0, ms;  // the super-block: columns, rows
  int64_t s0, ss;          // its steps of k
  int64_t j0, js;          // panels of B (from n0 on) that are packed
  bool last;               // no more steps follow
  bool direct;             // A's tiles are loaded from where it lies
  bool by_rows;            // B is packed once for all super-blocks, which are a few of A's rows
  uint16_t *a, *b;
  int64_t b_uses;  // of B's workspace, when it was packed
  float* waiting;  // sums between super-blocks along k, or null
  // What is left to the AVX-512 kernel: groups of columns, from n0 on, and panels of rows, from m0 on.
  uint8_t left[kGroups], *left_rows;

  int64_t panel() const { return ss * parts * 2 * kTileValues; }  // 16-bit values
  int64_t a_panels() const { return ceil_div(ms, kPanelRows); }
  int64_t units() const { return ceil_div(js, width); }
  int64_t ldc() const { return width * kPanelRows + (width > 1 ? kLanes : 0); }  // not a multiple of L1's sets
  int64_t unit_floats() const { return products * kPanelRows * ldc(); }
  bool b_stays() const { return by_rows && b && b_uses == cpu::workspace_uses(cpu::kLocalB); }
};

SPU_INLINE cpu::Operand columns_of(const cpu::Operand& x) {
  return {x.data, x.type, x.col, x.row};
}

// The super-block's steps of panels [begin, end) of an operand, or of two that follow each other along k.
template <bool Right>
static bool pack_chain(const TileGemm& g, uint16_t* out, int64_t panel_values, const cpu::Operand& one,
                       const cpu::Operand* two, int64_t r0, int64_t rows, int64_t begin, int64_t end) {
  bool bad = false;
  for (int64_t s = g.s0; s < g.s0 + g.ss;) {
    const int64_t from = s % g.half, steps = least(g.half - from, g.s0 + g.ss - s), k0 = from * kTileDepth;
    const int64_t depth = least(g.p->k - k0, steps * kTileDepth);
    const cpu::Operand& x = s < g.half ? one : *two;
    uint16_t* o = out + (s - g.s0) * g.parts * 2 * kTileValues;
    bad |= x.type == Type::fp16 ? pack_steps<Fp16, Right>(o, panel_values, x, r0, rows, k0, depth, begin, end)
                                : pack_steps<Bf16, Right>(o, panel_values, x, r0, rows, k0, depth, begin, end);
    s += steps;
  }
  return bad;
}

static void pack_rows(void* context, int64_t begin, int64_t end) {
  TileGemm& g = *static_cast<TileGemm*>(context);
  const auto pack = [&](int64_t from, int64_t to) {
    return pack_chain<false>(g, g.a, g.panel(), g.p->a, g.p->a2, g.m0, g.m0 + g.ms, from, to);
  };
  if (!pack(begin, end)) return;
  for (int64_t i = begin; i < end; ++i) g.left_rows[i] |= pack(i, i + 1);  // which of them, then
}

// Groups of columns [begin, end), from panel j0 on: a group's panels, a twin's beside each.
static void pack_columns(void* context, int64_t begin, int64_t end) {
  TileGemm& g = *static_cast<TileGemm*>(context);
  constexpr int64_t group = cpu::kStatColumns / kPanelRows;
  const cpu::Operand b = columns_of(g.p->b), other = g.p->b2 ? columns_of(*g.p->b2) : b;
  for (int64_t j = begin * group; j < least(end * group, g.js); j += group) {
    const int64_t column = g.n0 + g.j0 * kPanelRows, stop = least(j + group, g.js), apart = g.products * g.panel();
    bool bad = pack_chain<true>(g, g.b, apart, b, g.p->a2 ? &other : nullptr, column, g.n0 + g.ns, j, stop);
    if (g.products == 2) {
      bad |= pack_chain<true>(g, g.b + g.panel(), apart, other, nullptr, column, g.n0 + g.ns, j, stop);
    }
    if (bad) g.left[(g.j0 + j) / group] = 1;
  }
}

// One task's blocks of C: panels of A and units of B.
struct TileTask {
  int64_t i0, i1, u0, u1;
  float* c;
};

SPU_INLINE float* sums_of(const TileGemm& g, const TileTask& t, int64_t i, int64_t u) {
  if (g.waiting) return g.waiting + (i * ceil_div(g.ns, g.width * kPanelRows) + g.j0 / g.width + u) * g.unit_floats();
  return t.c + ((i - t.i0) % kBlockPanels * (t.u1 - t.u0) + u - t.u0) * g.unit_floats();
}

// A's panel i from step s of the super-block on.
template <Chain C>
SPU_INLINE Left left_of(const TileGemm& g, int64_t i, int64_t s) {
  if (!g.direct) return packed_left<C>(g.a + i * g.panel() + s * g.parts * 2 * kTileValues);
  const int64_t row = g.p->a.row;
  const uint16_t* at = static_cast<const uint16_t*>(g.p->a.data) + (g.m0 + i * kPanelRows) * row;
  return {at + (g.s0 + s) * kTileDepth, row * 2, row * kTileRows, kTileDepth};
}

// Steps [s, s + steps) of one unit.
template <Chain C>
SPU_INLINE void multiply_unit(const TileGemm& g, float* c, int64_t i, int64_t u, int64_t s, int64_t steps, bool add,
                              bool ask) {
  const int64_t at = s * g.parts * 2 * kTileValues, panels = least(g.width, g.js - u * g.width);
  const int64_t row = g.p->c_row + g.m0 + i * kPanelRows, rows = least(kPanelRows, g.ms - i * kPanelRows);
  for (int64_t j = 0; j < panels; ++j) {
    const int64_t panel = u * g.width + j, column = g.p->c_column + g.n0 + (g.j0 + panel) * kPanelRows;
    Ahead ahead = {&g.targets, row * g.targets.stride + column * g.targets.bytes, ask ? rows : 0};
    for (int64_t q = 0; q < g.products; ++q, ahead.rows = 0) {
      tile_kernel<C>(steps, left_of<C>(g, i, s), g.b + (panel * g.products + q) * g.panel() + at,
                     c + q * kPanelRows * g.ldc() + j * kPanelRows, g.ldc(), add, ahead);
    }
  }
}

SPU_INLINE void finish_unit(const TileGemm& g, const float* c, int64_t i, int64_t u) {
  const int64_t row = i * kPanelRows, column = (g.j0 + u * g.width) * kPanelRows;
  g.epilogue(*g.e, {c, c + kPanelRows * g.ldc(), g.ldc(), g.p->c_row + g.m0 + row, g.p->c_column + g.n0 + column,
                    least(kPanelRows, g.ms - row), least(g.width * kPanelRows, g.ns - column), row_length(*g.p)});
}

template <Chain C>
static void multiply_task(const TileGemm& g, const TileTask& t) {
  constexpr int64_t group = cpu::kStatColumns / kPanelRows;
  const int64_t blocks = ceil_div(g.ss, kBlockSteps[g.parts - 1]), each = ceil_div(g.ss, blocks);
  for (int64_t i0 = t.i0; i0 < t.i1; i0 += kBlockPanels) {
    for (int64_t s = 0; s < g.ss; s += each) {
      const bool done = g.last && s + each >= g.ss;
      for (int64_t i = i0; i < least(i0 + kBlockPanels, t.i1); ++i) {
        if (g.left_rows[i]) continue;
        for (int64_t u = t.u0; u < t.u1; ++u) {
          if (g.left[(g.j0 + u * g.width) / group]) continue;
          float* c = blocks > 1 || g.waiting ? sums_of(g, t, i, u) : t.c;
          multiply_unit<C>(g, c, i, u, s, least(each, g.ss - s), s > 0 || g.s0 > 0, done && g.targets.count);
          if (done) finish_unit(g, c, i, u);
        }
      }
    }
  }
}

// Tasks divide the units; they divide the rows only where there are fewer units than threads, and no sums over rows.
static int64_t row_tasks(const TileGemm& g) {
  return g.units() >= g.threads || g.e->column_sums ? 1 : least(ceil_div(g.threads, g.units()), g.a_panels());
}

template <Chain C>
static void run_tile_tasks(void* context, int64_t begin, int64_t end) {
  const TileGemm& g = *static_cast<TileGemm*>(context);
  const int64_t parts = row_tasks(g), columns = least(g.units(), g.threads);
  const Tiles tiles;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task % parts, q = task / parts;
    TileTask t = {r * g.a_panels() / parts, (r + 1) * g.a_panels() / parts, q * g.units() / columns,
                  (q + 1) * g.units() / columns, nullptr};
    const bool several = g.ss > kBlockSteps[g.parts - 1];
    t.c = cpu::workspace(cpu::kLocalC, (several ? kBlockPanels * (t.u1 - t.u0) : 1) * g.unit_floats());
    multiply_task<C>(g, t);
  }
}

static void in_parallel(const TileGemm& g, int64_t count, cpu::RangeBody body) {
  void* context = const_cast<TileGemm*>(&g);
  if (g.threads == 1) return body(context, 0, count);
  cpu::parallel({count, g.threads}, body, context);
}

// Groups of the super-block's columns that are packed at a time: those that the tasks' shares of L2 hold, in about
// equal parts. One, to the same place, where a single task has all of A in L2 beside it.
static int64_t groups_at_a_time(const TileGemm& g) {
  constexpr int64_t group = cpu::kStatColumns / kPanelRows;
  const int64_t step = g.parts * 2 * kTileValues * 2 * g.products * group;  // bytes of a group and step of k
  const int64_t groups = ceil_div(ceil_div(g.ns, kPanelRows), group);
  const bool beside_a = g.threads == 1 && !g.by_rows && !g.p->shared_b && g.a_panels() * g.panel() * 2 <= kBlockBytes;
  if (beside_a) return 1;
  const int64_t in_l2 = g.threads * kBlockBytes / (step * least(g.ss, kBlockSteps[g.parts - 1]));
  const int64_t fit = least(in_l2, kMostBytes / (step * g.ss));
  return ceil_div(groups, ceil_div(groups, fit > 1 ? fit : 1));
}

// The super-block's columns, whole groups at a time.
template <Chain C>
static void multiply_columns(TileGemm& g) {
  constexpr int64_t group = cpu::kStatColumns / kPanelRows;
  const int64_t each = groups_at_a_time(g) * group;
  const bool whole = each >= ceil_div(g.p->n, kPanelRows) && g.ns == g.p->n && g.ss == g.half && !g.p->b2;
  if (!g.b_stays()) g.b = whole ? panels_of(cpu::kLocalB, g.p->shared_b, g.p->b, g.p->n, g.p->k) : nullptr;
  const bool there = g.b;
  if (!there) g.b = reinterpret_cast<uint16_t*>(cpu::workspace(cpu::kLocalB, each * g.products * g.panel() / 2));
  g.b_uses = cpu::workspace_uses(cpu::kLocalB);
  for (g.j0 = 0; g.j0 < ceil_div(g.ns, kPanelRows); g.j0 += each) {
    g.js = least(each, ceil_div(g.ns, kPanelRows) - g.j0);
    if (!there) in_parallel(g, ceil_div(g.js, group), pack_columns);
    if (whole && !there && !memchr(g.left, 1, sizeof g.left)) {
      keep_panels(cpu::kLocalB, g.p->shared_b, g.p->b, g.p->n, g.p->k, g.b);
    }
    in_parallel(g, row_tasks(g) * least(g.units(), g.threads), run_tile_tasks<C>);
  }
}

// Rows [row, row + rows) and columns [column, column + columns) of the super-block, by the AVX-512 kernel.
static void multiply_left(const TileGemm& g, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const auto part = [](const cpu::Operand& x, int64_t i, int64_t j) {
    return cpu::Operand{static_cast<const char*>(x.data) + (i * x.row + j * x.col) * 2, x.type, x.row, x.col};
  };
  cpu::Product p = *g.p;
  row += g.m0, column += g.n0;
  p.m = rows, p.n = columns;
  p.c_row += row, p.c_column += column, p.c_length = row_length(*g.p);
  cpu::Operand a2 = {}, b2 = {};
  p.a = part(p.a, row, 0), p.b = part(p.b, 0, column);
  if (g.p->a2) a2 = part(*g.p->a2, row, 0), p.a2 = &a2;
  if (g.p->b2) b2 = part(*g.p->b2, 0, column), p.b2 = &b2;
  SPU_AMX_BASE().gemm(p, *g.e);
}

// The first place from i on, before n, whose flag is another.
SPU_INLINE int64_t run_end(const uint8_t* flags, int64_t i, int64_t n) {
  const uint8_t flag = flags[i];
  while (i < n && flags[i] == flag) ++i;
  return i;
}

// What the super-block left: runs of panels of rows, and of the other rows runs of groups of columns.
static void finish_left(const TileGemm& g) {
  const int64_t groups = ceil_div(g.ns, cpu::kStatColumns);
  for (int64_t i = 0, i1; i < g.a_panels(); i = i1) {
    i1 = run_end(g.left_rows, i, g.a_panels());
    const int64_t row = i * kPanelRows, rows = least(i1 * kPanelRows, g.ms) - row;
    if (g.left_rows[i]) multiply_left(g, row, rows, 0, g.ns);
    for (int64_t j = 0, j1; j < groups && !g.left_rows[i]; j = j1) {
      j1 = run_end(g.left, j, groups);
      const int64_t column = j * cpu::kStatColumns;
      if (g.left[j]) multiply_left(g, row, rows, column, least(j1 * cpu::kStatColumns, g.ns) - column);
    }
  }
}

// The super-block's rows of A.
static void pack_left(TileGemm& g) {
  const bool whole = g.ms == g.p->m && g.ss == g.half && !g.p->a2;
  g.a = whole ? panels_of(cpu::kSharedA, g.p->shared_a, g.p->a, g.p->m, g.p->k) : nullptr;
  if (g.a) return;
  g.a = reinterpret_cast<uint16_t*>(cpu::workspace(cpu::kSharedA, g.a_panels() * g.panel() / 2));
  in_parallel(g, g.a_panels(), pack_rows);
  if (!whole || memchr(g.left_rows, 1, static_cast<size_t>(g.a_panels()))) return;
  keep_panels(cpu::kSharedA, g.p->shared_a, g.p->a, g.p->m, g.p->k, g.a);
}

// Bytes of a panel's step of k.
static int64_t step_bytes(const TileGemm& g) {
  return g.parts * 2 * kTileValues * 2;
}

// Whether all of B stays in L2 while A's rows are packed and multiplied a few at a time. A call that shares A wants all
// of it at once.
static bool goes_by_rows(const TileGemm& g, int64_t steps) {
  const int64_t columns = ceil_div(g.p->n, cpu::kStatColumns) * (cpu::kStatColumns / kPanelRows);
  return g.threads == 1 && !g.direct && !g.p->shared_a && steps <= kMostSteps &&
         columns * g.products * steps * step_bytes(g) <= kBlockBytes;
}

// Panels of A that are packed at a time, of a product with `steps` steps of k.
static int64_t panels_at_a_time(const TileGemm& g, int64_t steps) {
  const int64_t most = kMostBytes / (least(steps, kMostSteps) * step_bytes(g));
  const int64_t fit = g.by_rows ? least(most, kReusedBytes / (steps * step_bytes(g))) : most;
  return fit > 1 ? fit : 1;
}

template <Chain C>
static void multiply_tiles(TileGemm& g) {
  const int64_t steps = g.p->a2 ? 2 * g.half : g.half;
  g.by_rows = goes_by_rows(g, steps);
  const int64_t rows = panels_at_a_time(g, steps) * kPanelRows;
  const int64_t columns = steps > kMostSteps ? kWaitingColumns : kMostColumns;
  for (g.n0 = 0; g.n0 < g.p->n; g.n0 += columns) {
    g.ns = least(columns, g.p->n - g.n0);
    for (g.m0 = 0; g.m0 < g.p->m; g.m0 += rows) {
      g.ms = least(rows, g.p->m - g.m0);
      memset(g.left_rows, 0, static_cast<size_t>(g.a_panels()));
      if (!g.b_stays()) memset(g.left, 0, sizeof g.left);
      if (steps > kMostSteps) {
        const int64_t units = ceil_div(g.ns, g.width * kPanelRows);
        g.waiting = cpu::workspace(cpu::kSharedC, g.a_panels() * units * g.unit_floats());
      }
      for (g.s0 = 0; g.s0 < steps; g.s0 += kMostSteps) {
        g.ss = least(kMostSteps, steps - g.s0), g.last = g.s0 + g.ss == steps;
        if (!g.direct) pack_left(g);
        if (!memchr(g.left_rows, 0, static_cast<size_t>(g.a_panels()))) break;
        multiply_columns<C>(g);
      }
      finish_left(g);
    }
  }
}

// fp16 sums that are rounded to 16 bits next do without lo * lo, which is at most 2^-16 of a product; those that stay
// in fp32 (a main gradient, the logits under an exponential) have all four.
SPU_INLINE bool wants_four(const cpu::Epilogue& e) {
  const bool stored = e.kind == cpu::Epilogue::store || e.kind == cpu::Epilogue::gated ||
                      e.kind == cpu::Epilogue::derivative || e.kind == cpu::Epilogue::gated_derivative;
  return !stored || (e.addend ? e.sum_type : e.out_type) == Type::fp32;
}

SPU_INLINE bool tiles_serve(const cpu::Product& p) {
  const cpu::Operand* const all[] = {&p.a, &p.b, p.a2 ? p.a2 : &p.a, p.b2 ? p.b2 : &p.b};
  for (const cpu::Operand* x : all) {
    if (x->type == Type::fp32 || x->type != p.a.type) return false;
  }
  const cpu::TileRule rule = cpu::tile_rule(p.a.type);
  return p.k > 0 && p.m >= rule.rows && p.n >= rule.columns && p.k >= rule.depth;
}

// Whether A may stay where it lies: bf16 rows along k, whole tiles of whole cache lines, and 32 rows that do not crowd
// in a few of the 64 sets of L1, where each panel of B would bring them from L2 anew.
SPU_INLINE bool loads_directly(const cpu::Product& p) {
  const int64_t lines = p.a.row / kTileDepth;
  return p.a.type == Type::bf16 && !p.a2 && p.a.col == 1 && p.k % kTileDepth == 0 && p.m % kPanelRows == 0 &&
         p.a.row % kTileDepth == 0 && reinterpret_cast<uintptr_t>(p.a.data) % 64 == 0 && lines % 32 != 0;
}

// What an epilogue reads, or else its first result. To ask for all that a gated one writes, three to five lines a row,
// kept the tiles' own loads waiting for longer than the epilogue gained.
SPU_INLINE Targets targets_of(const cpu::Product& p, const cpu::Epilogue& e) {
  const bool wide = e.kind == cpu::Epilogue::main_grad_add || e.out_type == Type::fp32;
  Targets targets = {{}, 0, row_length(p) * (wide ? 4 : 2), wide ? 4 : 2};
  if (e.kind == cpu::Epilogue::main_grad_add) {
    targets.add(e.main_grad);
  } else if (e.kind != cpu::Epilogue::softmax_stats) {
    targets.add(e.saved ? e.saved : e.addend ? e.addend : e.out), targets.add(e.saved_up);
  }
  return targets;
}

static void gemm(const cpu::Product& p, const cpu::Epilogue& e) {
  if (!tiles_serve(p)) return SPU_AMX_BASE().gemm(p, e);
  uint8_t left_rows[kMostPanels];
  TileGemm g = {};
  g.left_rows = left_rows;
  g.p = &p, g.e = &e, g.epilogue = choose_epilogue(e);
  g.targets = targets_of(p, e);
  g.parts = p.a.type == Type::fp16 ? 2 : 1;
  g.products = p.b2 && !p.a2 ? 2 : 1;
  g.half = ceil_div(p.k, kTileDepth);
  g.width = e.kind == cpu::Epilogue::softmax_stats ? cpu::kStatColumns / kPanelRows : 1;
  g.threads = cpu::threads_for(p, kParallelTiles, kSharedTiles);
  g.direct = loads_directly(p);
  if (p.a.type == Type::bf16) return multiply_tiles<Chain::one>(g);
  if (wants_four(e)) return multiply_tiles<Chain::four>(g);
  multiply_tiles<Chain::three>(g);
}

}  // namespace spu::SPU_ISA_NS
