// Epilogues: what happens to a finished fp32 accumulator tile. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

// A tile of C: rows x cols accumulators at c with leading dimension ldc, whose corner is (row, col) of C [m, n].
struct Tile {
  const float* c;
  int64_t ldc, row, col, rows, cols, n;
};

using TileEpilogue = void (*)(const cpu::Epilogue& e, const Tile& t);

template <math::Act A, class T>
static void store_activated(const cpu::Epilogue& e, const Tile& t) {
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + t.col : nullptr;
  const int64_t at = t.row * t.n + t.col;
  T* out = static_cast<T*>(e.out) + at;
  T* preact = e.preact ? static_cast<T*>(e.preact) + at : nullptr;
  for (int64_t j = 0; j < t.cols; j += kLanes) {
    const int64_t left = t.cols - j;
    if (left >= kLanes) {
      const vf b = bias ? load(bias + j) : vf{};
      for (int64_t i = 0; i < t.rows; ++i) {
        vf z = load(t.c + i * t.ldc + j);
        if (bias) z = z + b;
        if (preact) store(preact + i * t.n + j, z);
        store(out + i * t.n + j, math::activate<A, vf>(z));
      }
    } else {
      const vf b = bias ? load_some(bias + j, left) : vf{};
      for (int64_t i = 0; i < t.rows; ++i) {
        vf z = load_some(t.c + i * t.ldc + j, left);
        if (bias) z = z + b;
        if (preact) store_some(preact + i * t.n + j, z, left);
        store_some(out + i * t.n + j, math::activate<A, vf>(z), left);
      }
    }
  }
}

static void store_main_grad(const cpu::Epilogue& e, const Tile& t) {
  vi bad = {};
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    float* g = e.main_grad + (t.row + i) * t.n + t.col;
    for (int64_t j = 0; j < t.cols; j += kLanes) {
      const int64_t left = t.cols - j;
      const bool whole = left >= kLanes;
      const vf acc = whole ? load(c + j) : load_some(c + j, left);
      bad |= math::is_nonfinite<vf>(acc);
      vf v = acc * e.inv_scale;
      if (e.accumulate) v = (whole ? load(g + j) : load_some(g + j, left)) + v;
      if (whole) {
        store(g + j, v);
      } else {
        store_some(g + j, v, left);
      }
    }
  }
  if (any(bad)) __atomic_store_n(e.nonfinite, 1, __ATOMIC_RELAXED);
}

template <class T>
static TileEpilogue activated(math::Act act) {
  switch (act) {
    case math::Act::relu:
      return store_activated<math::Act::relu, T>;
    case math::Act::gelu:
      return store_activated<math::Act::gelu, T>;
    case math::Act::gelu_tanh:
      return store_activated<math::Act::gelu_tanh, T>;
    case math::Act::silu:
      return store_activated<math::Act::silu, T>;
    default:
      return store_activated<math::Act::none, T>;
  }
}

static TileEpilogue choose_epilogue(const cpu::Epilogue& e) {
  if (!e.out) return store_main_grad;
  if (e.out_type == cpu::Type::fp16) return activated<Fp16>(e.act);
  if (e.out_type == cpu::Type::bf16) return activated<Bf16>(e.act);
  return activated<float>(e.act);
}

}  // namespace SPU_ISA_NS
}  // namespace spu
