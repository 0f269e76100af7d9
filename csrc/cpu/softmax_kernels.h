// Losses and gradients from rows of logits. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_softmax.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// A lane adds up so many exponentials before they are added to the sum: its rounding grows with the sum of the two
// lengths, not with their product.
constexpr int64_t kRunColumns = 32 * kLanes;

SPU_INLINE float row_maximum(const float* z, int64_t cols) {
  const vf lowest = O::splat(-INFINITY);
  vf most = lowest, other = lowest;
  int64_t j = 0;
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes) {
    const vf a = load(z + j), b = load(z + j + kLanes);
    most = a > most ? a : most, other = b > other ? b : other;
  }
  for (; j < cols; j += kLanes) {
    const vf a = load_or(z + j, cols - j, lowest);
    most = a > most ? a : most;
  }
  return top_lane(most > other ? most : other);
}

// z = exp(z - top); their sum.
SPU_INLINE float exponentials(float* z, int64_t cols, float top) {
  const vf lowest = O::splat(-INFINITY);
  vf total = {};
  for (int64_t run = 0; run < cols; run += kRunColumns) {
    vf sum = {};
    for_vectors(least(cols - run, kRunColumns), [&](int64_t j, int64_t left) SPU_LAMBDA {
      float* at = z + run + j;
      const vf e = math::exp_or_zero<vf>((left < kLanes ? load_or(at, left, lowest) : load(at)) - top);
      store_upto(at, e, left);
      sum += e;
    });
    total += sum;
  }
  return sum_of(total);
}

// A maximum passes NaN by, but its exponential does not: the sum, and with it the whole row, is NaN as in torch. So is
// that of a row whose maximum is infinite.
template <class T>
static void cross_entropy_rows(const cpu::CrossEntropy& c, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* z = c.logits + row * c.cols;
    T* dz = static_cast<T*>(c.dz) + row * c.cols;
    const int64_t target = c.target[row];
    if (target == c.ignore_index) {
      memset(static_cast<void*>(dz), 0, sizeof(T) * static_cast<size_t>(c.cols));
      c.losses[row] = 0.0f;
      continue;
    }
    const float top = row_maximum(z, c.cols), found = z[target] - top;
    const float total = exponentials(z, c.cols, top);
    const float of_target = z[target], scale = c.grad[row] / total;
    for_vectors(c.cols,
                [&](int64_t j, int64_t left) SPU_LAMBDA { store_upto(dz + j, load_upto(z + j, left) * scale, left); });
    store_some(dz + target, O::splat((of_target / total - 1.0f) * c.grad[row]), 1);
    c.losses[row] = logf(total) - found;
  }
}

static void cross_entropy(const cpu::CrossEntropy& c, int64_t begin, int64_t end) {
  if (c.type == Type::fp16) return cross_entropy_rows<Fp16>(c, begin, end);
  if (c.type == Type::bf16) return cross_entropy_rows<Bf16>(c, begin, end);
  cross_entropy_rows<float>(c, begin, end);
}

}  // namespace spu::SPU_ISA_NS
