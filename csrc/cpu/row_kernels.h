// Sums of rows of an embedding's gradient, and rotary positions. Included in the namespace of an instruction set.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

template <bool Accumulate>
SPU_INLINE vi add_scaled(float* out, vf sum, float inv_scale, int64_t left) {
  const vf v = sum * inv_scale;
  store_upto(out, Accumulate ? load_upto(out, left) + v : v, left);
  return (vi)math::is_nonfinite<vf>(sum);
}

template <bool Accumulate, class T>
static bool sum_rows_typed(const T* rows, int64_t cols, const uint32_t* which, int64_t count, float* out,
                           float inv_scale) {
  vi bad = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
    vf sum[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = rows + which[i] * cols + j;
      for (int v = 0; v < 4; ++v) sum[v] += load(row + v * kLanes);
    }
    for (int v = 0; v < 4; ++v) bad |= add_scaled<Accumulate>(out + j + v * kLanes, sum[v], inv_scale, kLanes);
  }
  for (; j < cols; j += kLanes) {
    const int64_t left = cols - j;
    vf sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load_upto(rows + which[i] * cols + j, left);
    bad |= add_scaled<Accumulate>(out + j, sum, inv_scale, left);
  }
  return any(bad);
}

template <class T>
static bool sum_rows_into(const void* rows, int64_t cols, const uint32_t* which, int64_t count, float* out,
                          float inv_scale, bool accumulate) {
  const T* typed = static_cast<const T*>(rows);
  return accumulate ? sum_rows_typed<true>(typed, cols, which, count, out, inv_scale)
                    : sum_rows_typed<false>(typed, cols, which, count, out, inv_scale);
}

static bool sum_rows(Type type, const void* rows, int64_t cols, const uint32_t* which, int64_t count, float* out,
                     float inv_scale, bool accumulate) {
  if (type == Type::fp16) return sum_rows_into<Fp16>(rows, cols, which, count, out, inv_scale, accumulate);
  if (type == Type::bf16) return sum_rows_into<Bf16>(rows, cols, which, count, out, inv_scale, accumulate);
  return sum_rows_into<float>(rows, cols, which, count, out, inv_scale, accumulate);
}

// Lanes 1, 0, 3, 2, ...
template <int... I>
SPU_INLINE vf neighbours(vf v, Lanes<I...>) {
  return shuffled(v, v, Lanes<(I ^ 1)...>{});
}

// 1, -1, 1, -1, ...
SPU_INLINE vf alternating() {
  vf sign = {};
  for (int i = 0; i < kLanes; ++i) sign[i] = i % 2 ? -1.0f : 1.0f;
  return sign;
}

// Pairs (x_i, x_{i + d/2}): (x1 c1 - x2 s1, x2 c2 + x1 s2); inverse: the transpose of that.
template <bool Inverse, class T, class A>
SPU_INLINE void rotate_halves(const T* x, const A* cos, const A* sin, T* out, int64_t half) {
  for_vectors(half, [&](int64_t j, int64_t left) SPU_LAMBDA {
    const vf x1 = load_upto(x + j, left), x2 = load_upto(x + half + j, left);
    const vf c1 = load_upto(cos + j, left), c2 = load_upto(cos + half + j, left);
    const vf s1 = load_upto(sin + j, left), s2 = load_upto(sin + half + j, left);
    store_upto(out + j, Inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1, left);
    store_upto(out + half + j, Inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2, left);
  });
}

// The same of pairs (x_{2i}, x_{2i+1}).
template <bool Inverse, class T, class A>
SPU_INLINE void rotate_neighbours(const T* x, const A* cos, const A* sin, T* out, int64_t head_dim) {
  const typename MakeLanes<kLanes>::type lanes = {};
  const vf sign = alternating();
  for_vectors(head_dim, [&](int64_t j, int64_t left) SPU_LAMBDA {
    const vf v = load_upto(x + j, left), c = load_upto(cos + j, left), s = load_upto(sin + j, left);
    const vf other = Inverse ? neighbours(v * s, lanes) : neighbours(v, lanes) * s;
    store_upto(out + j, Inverse ? v * c + other * sign : v * c - other * sign, left);
  });
}

template <bool Interleaved, bool Inverse, class T, class A>
static void rotary_tokens(const cpu::Rotary& r, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / r.tokens, token = row % r.tokens;
    const A* cos = static_cast<const A*>(r.cos) + batch * r.cos_batch + token * r.head_dim;
    const A* sin = static_cast<const A*>(r.sin) + batch * r.cos_batch + token * r.head_dim;
    for (int which = 0; which < 2; ++which) {
      const cpu::HeadsView &in = r.in[which], &out = r.out[which];
      const T* x = static_cast<const T*>(in.data) + batch * in.batch + token * in.token;
      T* y = static_cast<T*>(const_cast<void*>(out.data)) + batch * out.batch + token * out.token;
      for (int64_t head = 0; head < r.heads[which]; ++head, x += in.head, y += out.head) {
        if constexpr (Interleaved) {
          rotate_neighbours<Inverse>(x, cos, sin, y, r.head_dim);
        } else {
          rotate_halves<Inverse>(x, cos, sin, y, r.head_dim / 2);
        }
      }
    }
  }
}

template <class T, class A>
static void rotary_typed(const cpu::Rotary& r, int64_t begin, int64_t end) {
  if (r.interleaved) {
    return r.inverse ? rotary_tokens<true, true, T, A>(r, begin, end) : rotary_tokens<true, false, T, A>(r, begin, end);
  }
  r.inverse ? rotary_tokens<false, true, T, A>(r, begin, end) : rotary_tokens<false, false, T, A>(r, begin, end);
}

template <class T>
static void rotary_of(const cpu::Rotary& r, int64_t begin, int64_t end) {
  r.angles == Type::fp32 ? rotary_typed<T, float>(r, begin, end) : rotary_typed<T, T>(r, begin, end);
}

static void rotary(const cpu::Rotary& r, int64_t begin, int64_t end) {
  if (r.type == Type::fp16) return rotary_of<Fp16>(r, begin, end);
  if (r.type == Type::bf16) return rotary_of<Bf16>(r, begin, end);
  rotary_of<float>(r, begin, end);
}

}  // namespace spu::SPU_ISA_NS
