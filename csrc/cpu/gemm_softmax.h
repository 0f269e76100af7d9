// Epilogues of the linear cross-entropy: logits that are never stored. Included in the namespace of an instruction set.
//
// The forward keeps of each row and group of kStatColumns logits the maximum and the sum of exponentials (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018, by groups); groups are combined in order.
#pragma once

#include "cpu/gemm_tile.h"
#include "math/elementary.h"

namespace spu::SPU_ISA_NS {

// The first n lanes from p, the others from `rest`.
SPU_INLINE vf load_or(const float* p, int64_t n, vf rest) {
  if (n >= kLanes) return load(p);
  float v[kLanes];
  store(v, rest);
  memcpy(v, p, sizeof(float) * static_cast<size_t>(n));
  return load(v);
}

SPU_INLINE float top_lane(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  float top = lanes[0];
  for (int j = 1; j < kLanes; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

static void softmax_stats(const cpu::Epilogue& e, const Tile& t) {
  float* stats = e.stats + (t.col / cpu::kStatColumns * e.rows + t.row) * 2;
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = t.c + i * t.ldc;
    const vf lowest = O::splat(-INFINITY);
    vf most = lowest, sum = {};
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      const vf z = load_or(c + j, left, lowest);
      most = z > most ? z : most;
    });
    const float top = top_lane(most), shift = math::is_nonfinite(top) ? 0.0f : top;
    for_vectors(t.cols, [&](int64_t j, int64_t left)
                            SPU_LAMBDA { sum += math::exp<vf>(load_or(c + j, left, lowest) - shift); });
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
    T* out = static_cast<T*>(e.out) + (t.row + i) * t.n + t.col;
    if (e.target[t.row + i] == e.ignore_index) {
      memset(out, 0, sizeof(T) * static_cast<size_t>(t.cols));
      continue;
    }
    for_vectors(t.cols, [&](int64_t j, int64_t left) SPU_LAMBDA {
      store_upto(out + j, math::exp<vf>(load_upto(c + j, left) - lse) * grad, left);
    });
    const int64_t target = e.target[t.row + i] - t.col;
    if (target >= 0 && target < t.cols) {
      store_some(out + target, (math::exp<vf>(O::splat(c[target]) - lse) - 1.0f) * grad, 1);
    }
  }
}

}  // namespace spu::SPU_ISA_NS
