// Shared by the op files, beside torch/tensors.h: operands, checks of the device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/gemm.h"
#include "cuda/runtime.h"
#include "torch/tensors.h"

namespace spu::cuda {

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

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return new_empty_of(like, sizes, dtype);
}

// Memory on a tensor's device, held as long as this object lives: launches before that use it in the stream's order.
class TensorScratch final : public Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : like_(like) {}
  void* bytes(int64_t count) override {
    held_.push_back(new_empty(like_, {count}, ScalarType::Byte));
    return held_.back().mutable_data_ptr();
  }

 private:
  Tensor like_;
  std::vector<Tensor> held_;
};

inline Tensor empty_as(const Tensor& like) {
  return new_empty(like, sizes_of(like), like.scalar_type());
}

// A one-element fp32 tensor in device memory: inv_scale, found_inf, step, grad_scale. No value is read on the host.
inline const float* scalar_data(const char* op, const char* what, const Tensor& t, const Tensor& like) {
  expect_device(op, what, t, like);
  checks::expect_one_value(op, what, t);
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* flag_data(const char* op, const Tensor& found_inf, const Tensor& like) {
  scalar_data(op, "found_inf", found_inf, like);
  return static_cast<float*>(found_inf.mutable_data_ptr());
}

// The fp32 buffer of a gradient of numel values.
inline float* main_grad_data(const char* op, const Tensor& main_grad, int64_t numel, const Tensor& like) {
  expect_device(op, "main_grad", main_grad, like);
  return main_grad_values(op, main_grad, numel);
}

struct Matrix : MatrixView {
  Operand operand() const { return {data(), row, col}; }
  Operand transposed() const { return {data(), col, row}; }
};

inline Matrix as_matrix(const char* op, const char* what, const Tensor& t) {
  return {view_of(op, what, t)};
}

inline Matrix as_weight(const char* op, const Tensor& weight) {
  expect_weight(op, weight);
  return as_matrix(op, "weight", weight);
}

}  // namespace spu::cuda
