// Epilogues: what happens to a finished fp32 accumulator block. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_softmax.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// What the rows of a block share is read once: a store to the results might change it, as far as the compiler knows.
template <class T, class P>
SPU_INLINE T* corner(P* matrix, const Tile& t) {
  return matrix ? static_cast<T*>(matrix) + t.row * t.n + t.col : nullptr;
}
template <class T>
SPU_INLINE T* row_of(T* corner, const Tile& t, int64_t i) {
  return corner ? corner + i * t.n : nullptr;
}

// The sums as they are.
template <class T>
static void store_plain(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  T* const out = corner<T>(e.out, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    T* const row[] = {out + i * t.n};
    if (t.cols == 2 * kLanes) {  // a panel of the tiles
      store_pair(row[0], load(c), load(c + kLanes));
    } else {
      store_row(row, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA { return Results<1>{load_upto(c + j, left)}; });
    }
  }
}

template <math::Act A, class T>
static void store_activated(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + t.col : nullptr;
  T *const out = corner<T>(e.out, t), *const preact = corner<T>(e.preact, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    T* const rows[] = {row_of(out, t, i), row_of(preact, t, i)};
    store_row(rows, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf z = load_upto(c + j, left);
      if (bias) z = z + load_upto(bias + j, left);
      return Results<2>{math::activate<A, vf>(z), z};
    });
  }
}

// The sums, rounded to T as if they were stored, are added to what is of S.
template <class T, class S>
static void store_added(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + t.col : nullptr;
  const S* const addend = corner<const S>(e.addend, t);
  S* const out = corner<S>(e.out, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    const S* other = addend + i * t.n;
    S* const row[] = {out + i * t.n};
    store_row(row, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf z = load_upto(c + j, left);
      if (bias) z = z + load_upto(bias + j, left);
      return Results<1>{load_upto(other + j, left) + rounded_to<T>(z)};
    });
  }
}

template <class S>
static TileEpilogue adding_epilogue(Type sum_type) {
  if (sum_type == Type::fp16) return store_added<Fp16, S>;
  if (sum_type == Type::bf16) return store_added<Bf16, S>;
  return store_added<float, S>;
}

template <bool Accumulate>
static void store_main_grad(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  float* const grad = corner<float>(e.main_grad, t);
  const float inv_scale = e.inv_scale;
  vi bad = {};
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    float* g = grad + i * t.n;
    const auto add = [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf acc = load_upto(c + j, left);
      bad |= math::is_nonfinite<vf>(acc);
      const vf v = acc * inv_scale;
      store_upto(g + j, Accumulate ? load_upto(g + j, left) + v : v, left);
    };
    if (t.cols == 2 * kLanes) {  // a panel of the tiles
      add(0, kLanes), add(kLanes, kLanes);
    } else {
      for_vectors(t.cols, add);
    }
  }
  if (any(bad)) __atomic_store_n(e.nonfinite, 1, __ATOMIC_RELAXED);
}

// h = act(gate) * up from the accumulators; gate and up are kept for the backward, rounded on their own.
template <math::Act A, class T>
static void store_gated(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  T *const out = corner<T>(e.out, t), *const gate = corner<T>(e.preact, t), *const up = corner<T>(e.up, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float *c = t.c + i * t.ldc, *c2 = t.c2 + i * t.ldc;
    T* const rows[] = {row_of(out, t, i), row_of(gate, t, i), row_of(up, t, i)};
    store_row(rows, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_upto(c + j, left), u = load_upto(c2 + j, left);
      return Results<3>{math::activate<A, vf>(z) * u, z, u};
    });
  }
}

struct ValueAndSlope {
  vf value, slope;
};

// act(z) and act'(z). gelu's share their exponential by themselves, as equal expressions.
template <math::Act A>
SPU_INLINE ValueAndSlope value_and_slope(vf z) {
  if constexpr (A == math::Act::silu) {
    // As math::silu and math::silu_grad, from one exponential; below -87 silu is 0 here (NaN at -inf, as there).
    const vf c = O::clamp(z, -87.0f, 87.0f);
    const math::Logistic<vf> s = math::logistic_pair<vf>(c);
    const vf value = z * (z < -87.0f ? vf{} : s.up);
    return {value, s.up * O::fma(c, s.down, O::splat(1.0f)) + (z - z)};
  }
  return {math::activate<A, vf>(z), math::activate_backward<A, vf>(O::splat(1.0f), z)};
}

// dz = acc * act'(saved), and h = act(saved). Column sums are of the rounded dz: of a block's rows first, so that their
// rounding grows with the number of blocks and the rows of one.
template <math::Act A, class T>
static void store_derivative(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  alignas(64) float sums[cpu::kStatColumns] = {};
  float* const total = e.column_sums;
  const T* const saved = corner<const T>(e.saved, t);
  T *const out = corner<T>(e.out, t), *const acted = corner<T>(e.acted, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    const T* z_row = saved + i * t.n;
    T* const rows[] = {row_of(out, t, i), row_of(acted, t, i)};
    store_row(rows, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_upto(z_row + j, left), dh = load_upto(c + j, left);
      if (acted && A != math::Act::relu) {
        const ValueAndSlope both = value_and_slope<A>(z);
        return Results<2>{dh * both.slope, both.value};
      }
      return Results<2>{math::activate_backward<A, vf>(dh, z), acted ? math::activate<A, vf>(z) : z};
    });
    if (!total) continue;
    for_vectors(t.cols, [&](int64_t j, int64_t left)
                            SPU_LAMBDA { store(sums + j, load(sums + j) + load_upto(rows[0] + j, left)); });
  }
  if (!total) return;
  for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
    float* at = total + t.col + j;
    store_upto(at, load_upto(at, left) + load(sums + j), left);
  });
}

// dgate = acc * up * act'(gate), dup = acc * act(gate), and h = act(gate) * up again.
template <math::Act A, class T>
static void store_gated_derivative(const cpu::Epilogue& e, const Tile& tile) {
  const Tile t = tile;
  const T *const gates = corner<const T>(e.saved, t), *const ups = corner<const T>(e.saved_up, t);
  T *const dgate = corner<T>(e.out, t), *const dup = corner<T>(e.up, t), *const h = corner<T>(e.acted, t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    const T *gate = gates + i * t.n, *up = ups + i * t.n;
    T* const rows[] = {dgate + i * t.n, dup + i * t.n, h + i * t.n};
    store_row(rows, t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf dh = load_upto(c + j, left), u = load_upto(up + j, left);
      const ValueAndSlope a = value_and_slope<A>(load_upto(gate + j, left));
      return Results<3>{dh * u * a.slope, dh * a.value, a.value * u};
    });
  }
}

template <class T, template <math::Act, class> class Choice>
SPU_INLINE TileEpilogue by_activation(math::Act act) {
  switch (act) {
    case math::Act::relu:
      return Choice<math::Act::relu, T>::body;
    case math::Act::gelu:
      return Choice<math::Act::gelu, T>::body;
    case math::Act::gelu_tanh:
      return Choice<math::Act::gelu_tanh, T>::body;
    case math::Act::silu:
      return Choice<math::Act::silu, T>::body;
    default:
      return Choice<math::Act::none, T>::body;
  }
}

template <math::Act A, class T>
struct Activated {
  static constexpr TileEpilogue body = store_activated<A, T>;
};
template <math::Act A, class T>
struct Gated {
  static constexpr TileEpilogue body = store_gated<A, T>;
};

template <math::Act A, class T>
struct Derivative {
  static constexpr TileEpilogue body = store_derivative<A, T>;
};

template <math::Act A, class T>
struct GatedDerivative {
  static constexpr TileEpilogue body = store_gated_derivative<A, T>;
};

template <class T>
static TileEpilogue typed_epilogue(const cpu::Epilogue& e) {
  if (e.kind == cpu::Epilogue::gated) return by_activation<T, Gated>(e.act);
  if (e.kind == cpu::Epilogue::derivative) return by_activation<T, Derivative>(e.act);
  if (e.kind == cpu::Epilogue::gated_derivative) return by_activation<T, GatedDerivative>(e.act);
  if (e.kind == cpu::Epilogue::softmax_grad) return softmax_grad<T>;
  if (e.addend) return adding_epilogue<T>(e.sum_type);
  if (e.act == math::Act::none && !e.bias && !e.preact) return store_plain<T>;
  return by_activation<T, Activated>(e.act);
}

static TileEpilogue choose_epilogue(const cpu::Epilogue& e) {
  if (e.kind == cpu::Epilogue::main_grad_add) return e.accumulate ? store_main_grad<true> : store_main_grad<false>;
  if (e.kind == cpu::Epilogue::softmax_stats) return softmax_stats;
  if (e.out_type == Type::fp16) return typed_epilogue<Fp16>(e);
  if (e.out_type == Type::bf16) return typed_epilogue<Bf16>(e);
  return typed_epilogue<float>(e);
}

}  // namespace spu::SPU_ISA_NS
