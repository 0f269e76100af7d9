// What the op files share: tensors seen as matrices, storage types, contiguous views that are written back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace spu {
namespace cpu {

inline bool type_of(ScalarType t, Type* out) {
  if (t == ScalarType::Half) return *out = Type::fp16, true;
  if (t == ScalarType::BFloat16) return *out = Type::bf16, true;
  if (t == ScalarType::Float) return *out = Type::fp32, true;
  return false;
}

inline Type storage_type(const char* op, const char* what, const Tensor& t) {
  Type type;
  if (!type_of(t.scalar_type(), &type)) {
    checks::fail("spu::", op, ": ", what, " must be float16, bfloat16 or float32, got ", checks::name(t.scalar_type()));
  }
  return type;
}

inline math::Act act_of(const char* op, const std::string& name) {
  if (name == "none") return math::Act::none;
  if (name == "relu") return math::Act::relu;
  if (name == "gelu") return math::Act::gelu;
  if (name == "gelu_tanh") return math::Act::gelu_tanh;
  if (name == "silu") return math::Act::silu;
  checks::fail("spu::", op, ": unknown activation '", name, "'; choose none, relu, gelu, gelu_tanh or silu");
}

// A tensor [..., cols] as a matrix [rows, cols] without a copy where its strides allow.
struct Matrix {
  Tensor keep;
  const void* data;
  Type type;
  int64_t rows, cols, row, col;  // strides in elements

  Operand operand() const { return {data, type, row, col}; }
  Operand transposed() const { return {data, type, col, row}; }
};

inline Matrix as_matrix(const char* op, const char* what, const Tensor& t) {
  checks::expect_cpu(op, what, t);
  if (t.dim() < 1) checks::fail("spu::", op, ": ", what, " must have at least one dimension, got a scalar");
  const int64_t last = t.dim() - 1;
  Matrix m = {t, nullptr, storage_type(op, what, t), 1, t.size(last), 0, t.stride(last)};
  bool merges = true;
  int64_t next = -1;  // the stride that the next outer dimension must have
  for (int64_t i = last - 1; i >= 0; --i) {
    const int64_t size = t.size(i);
    m.rows *= size;
    if (size == 1) continue;
    if (next < 0) {
      m.row = t.stride(i);
      next = m.row * size;
    } else {
      merges = merges && t.stride(i) == next;
      next *= size;
    }
  }
  if (!merges) {
    m.keep = torch::stable::contiguous(t);
    m.row = m.cols;
    m.col = 1;
  }
  if (m.cols <= 1) m.col = 1;
  if (m.rows <= 1) m.row = m.cols;
  m.data = m.keep.const_data_ptr();
  return m;
}

inline Matrix as_weight(const char* op, const Tensor& weight) {
  if (weight.dim() != 2) checks::fail("spu::", op, ": weight must be [out, in], got shape ", checks::shape(weight));
  return as_matrix(op, "weight", weight);
}

// t's sizes with another last one.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) sizes.push_back(t.size(i));
  sizes.push_back(last);
  return sizes;
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

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes >= kLargeBytes) advise_large_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline Tensor empty_as(const Tensor& like) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
  return new_empty(like, sizes, like.scalar_type());
}

inline float value(const Tensor& one) {
  return *static_cast<const float*>(one.const_data_ptr());
}

// found_inf := 1. Two stages may share one flag, so the store is atomic.
inline void raise_found_inf(const Tensor& found_inf) {
  const float one = 1.0f;
  __atomic_store(static_cast<float*>(found_inf.mutable_data_ptr()), &one, __ATOMIC_RELAXED);
}

// Runs body(begin, end) over [0, count) in pieces of at least `grain`, on the calling thread alone if one suffices.
template <class Body>
void for_ranges(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

constexpr int64_t kGrain = 16384;

}  // namespace cpu
}  // namespace spu
