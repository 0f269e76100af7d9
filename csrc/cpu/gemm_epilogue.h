// Epilogues: what happens to a finished fp32 accumulator block. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_softmax.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

template <math::Act A, class T>
static void store_activated(const cpu::Epilogue& e, const Tile& t) {
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + t.col : nullptr;
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t at = (t.row + i) * t.n + t.col;
    const float* c = t.c + i * t.ldc;
    T* out = static_cast<T*>(e.out) + at;
    T* preact = e.preact ? static_cast<T*>(e.preact) + at : nullptr;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf z = load_upto(c + j, left);
      if (bias) z = z + load_upto(bias + j, left);
      if (preact) store_upto(preact + j, z, left);
      store_upto(out + j, math::activate<A, vf>(z), left);
    });
  }
}

template <bool Accumulate>
static void store_main_grad(const cpu::Epilogue& e, const Tile& t) {
  vi bad = {};
  const float inv_scale = e.inv_scale;
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    float* g = e.main_grad + (t.row + i) * t.n + t.col;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf acc = load_upto(c + j, left);
      bad |= math::is_nonfinite<vf>(acc);
      const vf v = acc * inv_scale;
      store_upto(g + j, Accumulate ? load_upto(g + j, left) + v : v, left);
    });
  }
  if (any(bad)) __atomic_store_n(e.nonfinite, 1, __ATOMIC_RELAXED);
}

// h = act(gate) * up from the accumulators; gate and up are kept for the backward, rounded on their own.
template <math::Act A, class T>
static void store_gated(const cpu::Epilogue& e, const Tile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t at = (t.row + i) * t.n + t.col;
    const float *c = t.c + i * t.ldc, *c2 = t.c2 + i * t.ldc;
    T* out = static_cast<T*>(e.out) + at;
    T* gate = e.preact ? static_cast<T*>(e.preact) + at : nullptr;
    T* up = e.up ? static_cast<T*>(e.up) + at : nullptr;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_upto(c + j, left), u = load_upto(c2 + j, left);
      if (gate) store_upto(gate + j, z, left);
      if (up) store_upto(up + j, u, left);
      store_upto(out + j, math::activate<A, vf>(z) * u, left);
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
static void store_derivative(const cpu::Epilogue& e, const Tile& t) {
  alignas(64) float sums[cpu::kStatColumns] = {};
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t at = (t.row + i) * t.n + t.col;
    const float* c = t.c + i * t.ldc;
    const T* saved = static_cast<const T*>(e.saved) + at;
    T* out = static_cast<T*>(e.out) + at;
    T* acted = e.acted ? static_cast<T*>(e.acted) + at : nullptr;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_upto(saved + j, left), dh = load_upto(c + j, left);
      if (acted && A != math::Act::relu) {
        const ValueAndSlope both = value_and_slope<A>(z);
        store_upto(acted + j, both.value, left);
        store_upto(out + j, dh * both.slope, left);
      } else {
        if (acted) store_upto(acted + j, math::activate<A, vf>(z), left);
        store_upto(out + j, math::activate_backward<A, vf>(dh, z), left);
      }
      if (e.column_sums) store(sums + j, load(sums + j) + load_upto(out + j, left));
    });
  }
  if (!e.column_sums) return;
  float* total = e.column_sums + t.col;
  for_vectors(t.cols, [&](int64_t j, int64_t left)
                          SPU_LAMBDA { store_upto(total + j, load_upto(total + j, left) + load(sums + j), left); });
}

// dgate = acc * up * act'(gate), dup = acc * act(gate), and h = act(gate) * up again.
template <math::Act A, class T>
static void store_gated_derivative(const cpu::Epilogue& e, const Tile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t at = (t.row + i) * t.n + t.col;
    const float* c = t.c + i * t.ldc;
    const T *gate = static_cast<const T*>(e.saved) + at, *up = static_cast<const T*>(e.saved_up) + at;
    T *dgate = static_cast<T*>(e.out) + at, *dup = static_cast<T*>(e.up) + at, *h = static_cast<T*>(e.acted) + at;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf dh = load_upto(c + j, left), u = load_upto(up + j, left);
      const ValueAndSlope a = value_and_slope<A>(load_upto(gate + j, left));
      store_upto(dgate + j, dh * u * a.slope, left);
      store_upto(dup + j, dh * a.value, left);
      store_upto(h + j, a.value * u, left);
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
  return by_activation<T, Activated>(e.act);
}

static TileEpilogue choose_epilogue(const cpu::Epilogue& e) {
  if (e.kind == cpu::Epilogue::main_grad_add) return e.accumulate ? store_main_grad<true> : store_main_grad<false>;
  if (e.kind == cpu::Epilogue::softmax_stats) return softmax_stats;
  if (e.out_type == Type::fp16) return typed_epilogue<Fp16>(e);
  if (e.out_type == Type::bf16) return typed_epilogue<Bf16>(e);
  return typed_epilogue<float>(e);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
