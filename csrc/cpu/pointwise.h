// Element-wise kernels and column sums. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

template <math::Act A, class T>
static void act_backward_range(const T* dy, const T* saved, T* dz, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(dz + i, math::activate_backward<A, vf>(load(dy + i), load(saved + i)));
  if (i < end) {
    const int64_t n = end - i;
    store_some(dz + i, math::activate_backward<A, vf>(load_some(dy + i, n), load_some(saved + i, n)), n);
  }
}

template <class T>
static void act_backward_typed(math::Act act, const void* dy, const void* saved, void* dz, int64_t begin, int64_t end) {
  const T *g = static_cast<const T*>(dy), *s = static_cast<const T*>(saved);
  T* out = static_cast<T*>(dz);
  switch (act) {
    case math::Act::relu:
      return act_backward_range<math::Act::relu>(g, s, out, begin, end);
    case math::Act::gelu:
      return act_backward_range<math::Act::gelu>(g, s, out, begin, end);
    case math::Act::gelu_tanh:
      return act_backward_range<math::Act::gelu_tanh>(g, s, out, begin, end);
    case math::Act::silu:
      return act_backward_range<math::Act::silu>(g, s, out, begin, end);
    default:
      return act_backward_range<math::Act::none>(g, s, out, begin, end);
  }
}

static void act_backward(Type type, math::Act act, const void* dy, const void* saved, void* dz, int64_t begin,
                         int64_t end) {
  if (type == Type::fp16) return act_backward_typed<Fp16>(act, dy, saved, dz, begin, end);
  if (type == Type::bf16) return act_backward_typed<Bf16>(act, dy, saved, dz, begin, end);
  return act_backward_typed<float>(act, dy, saved, dz, begin, end);
}

// Sums in a cascade (16 rows, 16 of those, the total): rounding grows with the sum of the three lengths instead of
// their product, and an infinity stays one.
template <class T>
static vf column_cascade(const T* p, int64_t rows, int64_t cols, int64_t n) {
  constexpr int64_t run = 16;
  vf total = {}, middle = {};
  int64_t runs = 0;
  for (int64_t r = 0; r < rows; r += run) {
    const int64_t stop = r + run < rows ? r + run : rows;
    vf sum = {};
    if (n >= kLanes) {
      for (int64_t i = r; i < stop; ++i) sum += load(p + i * cols);
    } else {
      for (int64_t i = r; i < stop; ++i) sum += load_some(p + i * cols, n);
    }
    middle += sum;
    if (++runs % run == 0) {
      total += middle;
      middle = vf{};
    }
  }
  return total + middle;
}

template <class T>
static void column_sums_typed(const void* data, int64_t rows, int64_t cols, int64_t begin, int64_t end, float* out) {
  const T* p = static_cast<const T*>(data);
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t n = end - j < kLanes ? end - j : kLanes;
    store_some(out + j, column_cascade(p + j, rows, cols, n), n);
  }
}

static void column_sums(Type type, const void* data, int64_t rows, int64_t cols, int64_t begin, int64_t end,
                        float* out) {
  if (type == Type::fp16) return column_sums_typed<Fp16>(data, rows, cols, begin, end, out);
  if (type == Type::bf16) return column_sums_typed<Bf16>(data, rows, cols, begin, end, out);
  return column_sums_typed<float>(data, rows, cols, begin, end, out);
}

template <bool Accumulate, class T>
static bool unscale_range(const T* grad, float* main_grad, float inv_scale, int64_t begin, int64_t end) {
  vi bad = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const vf g = load(grad + i);
    bad |= math::is_nonfinite<vf>(g);
    store(main_grad + i, Accumulate ? load(main_grad + i) + g * inv_scale : g * inv_scale);
  }
  if (i < end) {
    const int64_t n = end - i;
    const vf g = load_some(grad + i, n);
    bad |= math::is_nonfinite<vf>(g);
    store_some(main_grad + i, Accumulate ? load_some(main_grad + i, n) + g * inv_scale : g * inv_scale, n);
  }
  return any(bad);
}

template <class T>
static bool unscale_typed(const void* grad, float* main_grad, float inv_scale, bool accumulate, int64_t begin,
                          int64_t end) {
  const T* g = static_cast<const T*>(grad);
  return accumulate ? unscale_range<true>(g, main_grad, inv_scale, begin, end)
                    : unscale_range<false>(g, main_grad, inv_scale, begin, end);
}

static bool unscale(Type type, const void* grad, float* main_grad, float inv_scale, bool accumulate, int64_t begin,
                    int64_t end) {
  if (type == Type::fp16) return unscale_typed<Fp16>(grad, main_grad, inv_scale, accumulate, begin, end);
  if (type == Type::bf16) return unscale_typed<Bf16>(grad, main_grad, inv_scale, accumulate, begin, end);
  return unscale_typed<float>(grad, main_grad, inv_scale, accumulate, begin, end);
}

static void add(const float* x, const float* y, float* out, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(out + i, load(x + i) + load(y + i));
  if (i < end) store_some(out + i, load_some(x + i, end - i) + load_some(y + i, end - i), end - i);
}

}  // namespace spu::SPU_ISA_NS
