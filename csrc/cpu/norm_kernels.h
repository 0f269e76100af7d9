// RMSNorm and LayerNorm over rows, statistics in fp32. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// The lanes below n; the others are zero.
SPU_INLINE vf below(vf v, int64_t n) {
  if (n >= kLanes) return v;
  float x[kLanes];
  store(x, v);
  return load_some(x, n);
}

// The sum of term(column, columns left) over a row, in four chains.
template <class Term>
SPU_INLINE float row_sum(int64_t cols, const Term& term) {
  vf sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sum[i] += term(j + i * kLanes, int64_t{kLanes});
  }
  for (; j + kLanes <= cols; j += kLanes) sum[0] += term(j, int64_t{kLanes});
  if (j < cols) sum[1] += term(j, cols - j);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The weight that a column is multiplied by.
template <class W>
SPU_INLINE vf norm_weight(const W* weight, int64_t j, int64_t left, float offset) {
  return weight ? load_upto(weight + j, left) + offset : O::splat(1.0f);
}

template <bool Layer, bool Rounded, class T, class W, class Y = T>
static void norm_rows(const cpu::Norm& n, int64_t begin, int64_t end) {
  const int64_t cols = n.cols;
  const W *weight = static_cast<const W*>(n.weight), *bias = static_cast<const W*>(n.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(n.x) + row * cols;
    if (n.residual) {
      const T* other = static_cast<const T*>(n.residual) + row * cols;
      T* sum = static_cast<T*>(n.sum) + row * cols;
      for_vectors(cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
        store_upto(sum + j, load_upto(x + j, left) + load_upto(other + j, left), left);
      });
      x = sum;  // rounded, as the sum is for everyone else
    }
    const float count = static_cast<float>(cols);
    float mean = 0;
    if constexpr (Layer) {
      mean = row_sum(cols, [&](int64_t j, int64_t left) SPU_LAMBDA { return load_upto(x + j, left); }) / count;
    }
    const float squares = row_sum(cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf v = load_upto(x + j, left);
      if constexpr (Layer) v = below(v - mean, left);
      return v * v;
    });
    const float rstd = 1.0f / math::Ops<float>::sqrt(squares / count + n.eps);
    for_vectors(cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      vf v = load_upto(x + j, left);
      if constexpr (Layer) v = v - mean;
      v = v * rstd;
      if constexpr (Rounded) v = rounded_to<T>(v);
      if (weight) v = v * norm_weight(weight, j, left, n.offset);
      if (bias) v = v + load_upto(bias + j, left);
      store_upto(static_cast<Y*>(n.y) + row * cols + j, v, left);
    });
    if (Layer) n.mean[row] = mean;
    n.rstd[row] = rstd;
  }
}

// With n the normalised row and g = dy * weight: dx = rstd (g - mean(g n) n), for LayerNorm less mean(g) too, plus
// dsum; dw = sum over rows of dy * n, db of dy. A block's sums go to its own row of dw and db.
template <bool Layer, bool Rounded, class T, class W, class Y = T>
static void norm_backward_blocks(const cpu::Norm& n, int64_t begin, int64_t end) {
  const int64_t cols = n.cols;
  const float share = 1.0f / static_cast<float>(cols);
  const W* weight = static_cast<const W*>(n.weight);
  for (int64_t block = begin; block < end; ++block) {
    float* dw = n.dw ? n.dw + block * cols : nullptr;
    float* db = n.db ? n.db + block * cols : nullptr;
    if (dw) memset(dw, 0, static_cast<size_t>(cols) * sizeof(float));
    if (db) memset(db, 0, static_cast<size_t>(cols) * sizeof(float));
    for (int64_t row = block * n.block_rows; row < least(n.rows, (block + 1) * n.block_rows); ++row) {
      const T* x = static_cast<const T*>(n.x) + row * cols;
      const Y* dy = static_cast<const Y*>(n.dy) + row * cols;
      const float mean = Layer ? n.mean[row] : 0.0f, rstd = n.rstd[row];
      vf along = {}, total = {};
      for_vectors(cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
        vf v = load_upto(x + j, left);
        if constexpr (Layer) v = v - mean;
        v = v * rstd;
        const vf d = load_upto(dy + j, left), g = d * norm_weight(weight, j, left, n.offset);
        along = O::fma(g, v, along);
        if constexpr (Layer) total += g;
        if (dw) store_upto(dw + j, O::fma(d, Rounded ? rounded_to<T>(v) : v, load_upto(dw + j, left)), left);
        if (db) store_upto(db + j, load_upto(db + j, left) + d, left);
      });
      if (!n.dx) continue;
      const float slope = sum_of(along) * share, shift = Layer ? sum_of(total) * share : 0.0f;
      const T* dsum = n.dsum ? static_cast<const T*>(n.dsum) + row * cols : nullptr;
      for_vectors(cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
        vf v = load_upto(x + j, left);
        if constexpr (Layer) v = v - mean;
        v = v * rstd;
        vf g = load_upto(dy + j, left) * norm_weight(weight, j, left, n.offset);
        if constexpr (Layer) g = g - shift;
        g = (g - v * slope) * rstd;
        if (dsum) g = g + load_upto(dsum + j, left);
        store_upto(static_cast<T*>(n.dx) + row * cols + j, g, left);
      });
    }
  }
}

template <class T, class W>
static void norm_typed(const cpu::Norm& n, int64_t begin, int64_t end) {
  if (n.layer) return norm_rows<true, false, T, W>(n, begin, end);
  if (n.rounded) return norm_rows<false, true, T, W>(n, begin, end);
  norm_rows<false, false, T, W>(n, begin, end);
}

template <class T, class W>
static void norm_backward_typed(const cpu::Norm& n, int64_t begin, int64_t end) {
  if (n.layer) return norm_backward_blocks<true, false, T, W>(n, begin, end);
  if (n.rounded) return norm_backward_blocks<false, true, T, W>(n, begin, end);
  norm_backward_blocks<false, false, T, W>(n, begin, end);
}

static void norm(const cpu::Norm& n, int64_t begin, int64_t end) {
  if (n.y_type != n.type) {  // rounding a row to fp32 changes nothing
    return n.y_type == Type::fp16 ? norm_rows<false, false, float, float, Fp16>(n, begin, end)
                                  : norm_rows<false, false, float, float, Bf16>(n, begin, end);
  }
  const bool wide = n.weight_type == Type::fp32;
  if (n.type == Type::fp16)
    return wide ? norm_typed<Fp16, float>(n, begin, end) : norm_typed<Fp16, Fp16>(n, begin, end);
  if (n.type == Type::bf16)
    return wide ? norm_typed<Bf16, float>(n, begin, end) : norm_typed<Bf16, Bf16>(n, begin, end);
  norm_typed<float, float>(n, begin, end);
}

static void norm_backward(const cpu::Norm& n, int64_t begin, int64_t end) {
  if (n.y_type != n.type) {
    return n.y_type == Type::fp16 ? norm_backward_blocks<false, false, float, float, Fp16>(n, begin, end)
                                  : norm_backward_blocks<false, false, float, float, Bf16>(n, begin, end);
  }
  const bool wide = n.weight_type == Type::fp32;
  if (n.type == Type::fp16) {
    return wide ? norm_backward_typed<Fp16, float>(n, begin, end) : norm_backward_typed<Fp16, Fp16>(n, begin, end);
  }
  if (n.type == Type::bf16) {
    return wide ? norm_backward_typed<Bf16, float>(n, begin, end) : norm_backward_typed<Bf16, Bf16>(n, begin, end);
  }
  norm_backward_typed<float, float>(n, begin, end);
}

}  // namespace spu::SPU_ISA_NS
