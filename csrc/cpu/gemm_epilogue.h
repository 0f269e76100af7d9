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
  if (e.out_type == Type::fp16) return typed_epilogue<Fp16>(e);
  if (e.out_type == Type::bf16) return typed_epilogue<Bf16>(e);
  return typed_epilogue<float>(e);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
