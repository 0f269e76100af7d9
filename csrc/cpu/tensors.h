// Shared by the op files, beside torch/tensors.h: operands, new tensors in large pages, contiguous views that are
// written back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/help.h"
#include "cpu/kernels.h"
#include "torch/tensors.h"

namespace spu::cpu {

struct Matrix : MatrixView {
  Operand operand() const { return {data(), type, row, col}; }
  Operand transposed() const { return {data(), type, col, row}; }
};

inline Matrix as_matrix(const char* op, const char* what, const Tensor& t) {
  checks::expect_cpu(op, what, t);
  return {view_of(op, what, t)};
}

inline Matrix as_weight(const char* op, const Tensor& weight) {
  expect_weight(op, weight);
  return as_matrix(op, "weight", weight);
}

// A tensor to write, contiguous: itself, or a copy that finish() writes back.
class Writable {
 public:
  explicit Writable(const Tensor& t) : target_(t), dense_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}
  template <class T>
  T* data() const {
    return static_cast<T*>(dense_.mutable_data_ptr());
  }
  void finish() {
    if (!target_.is_contiguous()) torch::stable::copy_(target_, dense_);
  }

 private:
  Tensor target_, dense_;
};

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = new_empty_of(like, sizes, dtype);
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes >= kLargeBytes) advise_large_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline Tensor empty_as(const Tensor& like) {
  return new_empty(like, sizes_of(like), like.scalar_type());
}

inline float value(const Tensor& one) {
  return *static_cast<const float*>(one.const_data_ptr());
}

// found_inf := 1. Two stages may share one flag, so the store is atomic.
inline void raise_found_inf(const Tensor& found_inf) {
  const float one = 1.0f;
  __atomic_store(static_cast<float*>(found_inf.mutable_data_ptr()), &one, __ATOMIC_RELAXED);
}

// Runs body(begin, end) over [0, count) in pieces of at least `grain`, on the calling thread alone if one suffices;
// from kSharedGrains pieces on with those that wait and can help.
constexpr int64_t kSharedGrains = 8;

template <class Body>
void for_ranges(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const RangeBody one = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  const int64_t parts = threads() + (count / grain >= kSharedGrains ? lent_threads() : 0);
  parallel({count, parts, grain}, one, const_cast<Body*>(&body));
}

constexpr int64_t kGrain = 16384;

}  // namespace spu::cpu
