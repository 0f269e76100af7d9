// Epilogues: what happens to a finished fp32 accumulator block. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

// A block of C: rows x cols accumulators at c with leading dimension ldc, whose corner is (row, col) of C [m, n]; the
// twin's accumulators at c2, where there is one.
struct Tile {
  const float *c, *c2;
  int64_t ldc, row, col, rows, cols, n;
};

using TileEpilogue = void (*)(const cpu::Epilogue& e, const Tile& t);

// Calls body(j, left) for the vectors of a row; left < kLanes marks a last, partial one.
template <class Body>
SPU_INLINE void for_vectors(int64_t cols, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) body(j, int64_t{kLanes});
  if (j < cols) body(j, cols - j);
}

template <class T>
SPU_INLINE vf load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, n);
}
template <class T>
SPU_INLINE void store_upto(T* p, vf v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_some(p, v, n);
  }
}

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
    T *gate = static_cast<T*>(e.preact) + at, *up = static_cast<T*>(e.up) + at;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_upto(c + j, left), u = load_upto(c2 + j, left);
      store_upto(gate + j, z, left);
      store_upto(up + j, u, left);
      store_upto(out + j, math::activate<A, vf>(z) * u, left);
    });
  }
}

// Maximum and sum of exp(z - maximum) of each row over this group of columns.
static void softmax_stats(const cpu::Epilogue& e, const Tile& t) {
  float* stats = e.stats + (t.col / cpu::kStatColumns * e.rows + t.row) * 2;
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    float top = c[0];
    vf most = O::splat(top);
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf z = most;
      if (left >= kLanes) {
        z = load(c + j);
      } else {
        memcpy(&z, c + j, sizeof(float) * static_cast<size_t>(left));
      }
      most = z > most ? z : most;
    });
    float lanes[kLanes];
    store(lanes, most);
    for (int j = 0; j < kLanes; ++j) top = lanes[j] > top ? lanes[j] : top;
    vf sum = {};
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf z = O::splat(-INFINITY);
      if (left >= kLanes) {
        z = load(c + j);
      } else {
        memcpy(&z, c + j, sizeof(float) * static_cast<size_t>(left));
      }
      sum += math::exp<vf>(z - top);
    });
    stats[2 * i] = top, stats[2 * i + 1] = sum_of(sum);
    const int64_t target = e.target[t.row + i] - t.col;
    if (target >= 0 && target < t.cols) e.target_value[t.row + i] = c[target];
  }
}

// dz = (softmax - onehot) * grad
template <class T>
static void softmax_grad(const cpu::Epilogue& e, const Tile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float *c = t.c + i * t.ldc, lse = e.lse[t.row + i], grad = e.grad[t.row + i];
    const int64_t target = e.target[t.row + i] - t.col;
    T* out = static_cast<T*>(e.out) + (t.row + i) * t.n + t.col;
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      store_upto(out + j, math::exp<vf>(load_upto(c + j, left) - lse) * grad, left);
    });
    if (target >= 0 && target < t.cols) {
      const vf p = math::exp<vf>(O::splat(c[target]) - lse) - 1.0f;
      store_some(out + target, p * grad, 1);
    }
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

template <class T>
static TileEpilogue typed_epilogue(const cpu::Epilogue& e) {
  if (e.kind == cpu::Epilogue::gated) return by_activation<T, Gated>(e.act);
  if (e.kind == cpu::Epilogue::softmax_grad) return softmax_grad<T>;
  return by_activation<T, Activated>(e.act);
}

static TileEpilogue choose_epilogue(const cpu::Epilogue& e) {
  if (e.kind == cpu::Epilogue::main_grad_add) return e.accumulate ? store_main_grad<true> : store_main_grad<false>;
  if (e.kind == cpu::Epilogue::softmax_stats) return softmax_stats;
  if (e.out_type == cpu::Type::fp16) return typed_epilogue<Fp16>(e);
  if (e.out_type == cpu::Type::bf16) return typed_epilogue<Bf16>(e);
  return typed_epilogue<float>(e);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
