// The gated MLP's pointwise backward. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_epilogue.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

template <math::Act A, class T>
static void gated_range(const T* dh, const T* gate, const T* up, T* dgate, T* dup, T* h, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i;
    const vf d = load_upto(dh + i, left), u = load_upto(up + i, left);
    const ValueAndSlope a = value_and_slope<A>(load_upto(gate + i, left));
    store_upto(dgate + i, d * u * a.slope, left);
    store_upto(dup + i, d * a.value, left);
    store_upto(h + i, a.value * u, left);
  }
}

template <class T>
static void gated_typed(math::Act act, const cpu::GatedBackward& g, int64_t begin, int64_t end) {
  const T *dh = static_cast<const T*>(g.dh), *gate = static_cast<const T*>(g.gate), *up = static_cast<const T*>(g.up);
  T *dgate = static_cast<T*>(g.dgate), *dup = static_cast<T*>(g.dup), *h = static_cast<T*>(g.h);
  if (act == math::Act::gelu) return gated_range<math::Act::gelu>(dh, gate, up, dgate, dup, h, begin, end);
  if (act == math::Act::gelu_tanh) return gated_range<math::Act::gelu_tanh>(dh, gate, up, dgate, dup, h, begin, end);
  gated_range<math::Act::silu>(dh, gate, up, dgate, dup, h, begin, end);
}

static void gated_backward(Type type, math::Act act, const cpu::GatedBackward& g, int64_t begin, int64_t end) {
  if (type == Type::fp16) return gated_typed<Fp16>(act, g, begin, end);
  if (type == Type::bf16) return gated_typed<Bf16>(act, g, begin, end);
  gated_typed<float>(act, g, begin, end);
}

}  // namespace spu::SPU_ISA_NS
