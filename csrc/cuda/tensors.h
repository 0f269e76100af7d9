// What the op files share: storage types, tensors seen as matrices, checks of the device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cuda/gemm.h"
#include "cuda/runtime.h"
#include "cuda/types.h"

namespace spu {
namespace cuda {

inline void expect_device(const char* op, const char* what, const Tensor& t, const Tensor& like) {
#ifdef SPU_HOST_SIM
  const bool here = t.is_cpu();
#else
  const bool here = t.is_cuda() && t.get_device_index() == like.get_device_index();
#endif
  (void)like;
  if (!here)
    checks::fail("spu::", op, ": ", what, " must be on the CUDA device of the first tensor; move it with .to()");
}

// Where kernels on the device of `like` find a dense tensor: on that device, or in pinned host memory.
inline void* device_address(const char* op, const char* what, const Tensor& t, const Tensor& like) {
  if (!t.is_contiguous()) checks::fail("spu::", op, ": ", what, " is not contiguous");
  if (!t.is_cpu()) {
    expect_device(op, what, t, like);
    return t.mutable_data_ptr();
  }
  if (t.numel() == 0) return nullptr;
  void* address = nullptr;
  if (cudaHostGetDevicePointer(&address, t.mutable_data_ptr(), 0) != cudaSuccess) {
    cudaGetLastError();  // it is answered for here
    checks::fail("spu::", op, ": ", what, " must be on the CUDA device, or in pinned host memory: ",
                 "make it with torch.empty(..., pin_memory=True)");
  }
  return address;
}

inline Type storage_type(const char* op, const char* what, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Type::fp16;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Float:
      return Type::fp32;
    default:
      checks::fail("spu::", op, ": ", what, " must be float16, bfloat16 or float32, got ",
                   checks::name(t.scalar_type()));
  }
}

inline math::Act act_of(const char* op, const std::string& name) {
  if (name == "none") return math::Act::none;
  if (name == "relu") return math::Act::relu;
  if (name == "gelu") return math::Act::gelu;
  if (name == "gelu_tanh") return math::Act::gelu_tanh;
  if (name == "silu") return math::Act::silu;
  checks::fail("spu::", op, ": unknown activation '", name, "'; choose none, relu, gelu, gelu_tanh or silu");
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(t);
  sizes.back() = last;
  return sizes;
}

inline Tensor empty_as(const Tensor& like) {
  return new_empty(like, sizes_of(like), like.scalar_type());
}

// A one-element fp32 tensor in device memory: inv_scale, found_inf, step, grad_scale. No value is read on the host.
inline const float* scalar_data(const char* op, const char* what, const Tensor& t, const Tensor& like) {
  expect_device(op, what, t, like);
  if (t.scalar_type() != ScalarType::Float || t.numel() != 1) {
    checks::fail("spu::", op, ": ", what, " must be one float32 value, got ", checks::name(t.scalar_type()), ' ',
                 checks::shape(t));
  }
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* flag_data(const char* op, const Tensor& found_inf, const Tensor& like) {
  scalar_data(op, "found_inf", found_inf, like);
  return static_cast<float*>(found_inf.mutable_data_ptr());
}

// The fp32 buffer of a gradient of numel values.
inline float* main_grad_data(const char* op, const Tensor& main_grad, int64_t numel, const Tensor& like) {
  expect_device(op, "main_grad", main_grad, like);
  checks::expect_dtype(op, "main_grad", main_grad, ScalarType::Float);
  if (!main_grad.is_contiguous() || main_grad.numel() != numel) {
    checks::fail("spu::", op, ": main_grad must be contiguous with ", numel, " values, got shape ",
                 checks::shape(main_grad));
  }
  return static_cast<float*>(main_grad.mutable_data_ptr());
}

// A tensor [..., cols] as a matrix [rows, cols] without a copy where its strides allow.
struct Matrix {
  Tensor keep;
  int64_t rows, cols, row, col;  // row, col: strides in elements

  Operand operand() const { return {keep.const_data_ptr(), row, col}; }
  Operand transposed() const { return {keep.const_data_ptr(), col, row}; }
};

inline Matrix as_matrix(const char* op, const char* what, const Tensor& t) {
  if (t.dim() < 1) checks::fail("spu::", op, ": ", what, " must have at least one dimension, got a scalar");
  const int64_t last = t.dim() - 1;
  Matrix m = {t, 1, t.size(last), 0, t.stride(last)};
  bool merges = true;
  int64_t next = -1;  // the stride that the next outer dimension must have
  for (int64_t i = last - 1; i >= 0; --i) {
    const int64_t size = t.size(i);
    m.rows *= size;
    if (size == 1) continue;
    if (next < 0) {
      m.row = t.stride(i);
    } else {
      merges = merges && t.stride(i) == next;
    }
    next = t.stride(i) * size;
  }
  if (!merges) {
    m.keep = torch::stable::contiguous(t);
    m.row = m.cols;
    m.col = 1;
  }
  if (m.cols <= 1) m.col = 1;
  if (m.rows <= 1) m.row = m.cols;
  return m;
}

}  // namespace cuda
}  // namespace spu
