// AdamW in one pass and sums of squares. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

// T is the 16-bit copy's type; a null copy is not written.
template <bool Copy, class T>
static void adamw_range(T* copy, float* param, const float* grad, float* m, float* v, float grad_scale,
                        const math::AdamWStep& step, int64_t begin, int64_t end) {
  const math::AdamWStep k = step;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const math::AdamWState<vf> s =
        math::adamw_step<vf>({load(param + i), load(m + i), load(v + i)}, load(grad + i) * grad_scale, k);
    store(param + i, s.param);
    store(m + i, s.m);
    store(v + i, s.v);
    if (Copy) store(copy + i, s.param);
  }
  if (i < end) {
    const int64_t n = end - i;
    const math::AdamWState<vf> s = math::adamw_step<vf>(
        {load_some(param + i, n), load_some(m + i, n), load_some(v + i, n)}, load_some(grad + i, n) * grad_scale, k);
    store_some(param + i, s.param, n);
    store_some(m + i, s.m, n);
    store_some(v + i, s.v, n);
    if (Copy) store_some(copy + i, s.param, n);
  }
}

static void adamw(cpu::Type type, void* copy, float* param, const float* grad, float* m, float* v, float grad_scale,
                  const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (!copy) {
    adamw_range<false>(static_cast<float*>(nullptr), param, grad, m, v, grad_scale, step, begin, end);
  } else if (type == cpu::Type::fp16) {
    adamw_range<true>(static_cast<Fp16*>(copy), param, grad, m, v, grad_scale, step, begin, end);
  } else {
    adamw_range<true>(static_cast<Bf16*>(copy), param, grad, m, v, grad_scale, step, begin, end);
  }
}

// Squares are taken in fp64: those of fp32 gradients above 1.8e19 or below 1e-19 leave fp32's range.
static double square_sum(const float* x, int64_t begin, int64_t end) {
  constexpr int half = kLanes / 2;
  vd sum[4] = {};
  int64_t i = begin;
  for (; i + 4 * half <= end; i += 4 * half) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vd d = __builtin_convertvector(load_raw<vf_half>(x + i + j * half), vd);
      sum[j] += d * d;
    }
  }
  double total = 0;
  for (; i < end; ++i) total += static_cast<double>(x[i]) * x[i];
  const vd all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int j = 0; j < half; ++j) total += all[j];
  return total;
}

}  // namespace SPU_ISA_NS
}  // namespace spu
