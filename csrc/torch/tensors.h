// Shared by the op files of both libraries: storage types, tensors seen as matrices, checks of shapes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "math/activation.h"
#include "math/types.h"
#include "torch/checks.h"

namespace spu {

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

inline math::Act gate_act_of(const char* op, const std::string& name) {
  const math::Act act = act_of(op, name);
  if (act == math::Act::none || act == math::Act::relu) {
    checks::fail("spu::", op, ": a gate's activation is silu, gelu or gelu_tanh, got '", name, "'");
  }
  return act;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

// t's sizes with another last one.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(t);
  sizes.back() = last;
  return sizes;
}

// By the C function: torch::stable::new_empty looks its op up by name and boxes every argument, which for a small op
// takes as long as the rest of it.
inline Tensor new_empty_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  type, device_type, device_index, &made));
  return Tensor(made);
}

// A tensor [..., cols] as a matrix [rows, cols] without a copy where its strides allow.
struct MatrixView {
  Tensor keep;
  Type type;
  int64_t rows, cols, row, col;  // row, col: strides in elements

  const void* data() const { return keep.const_data_ptr(); }
};

inline MatrixView view_of(const char* op, const char* what, const Tensor& t) {
  if (t.dim() < 1) checks::fail("spu::", op, ": ", what, " must have at least one dimension, got a scalar");
  const int64_t last = t.dim() - 1;
  MatrixView m = {t, storage_type(op, what, t), 1, t.size(last), 0, t.stride(last)};
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

inline void expect_weight(const char* op, const Tensor& weight) {
  if (weight.dim() != 2) checks::fail("spu::", op, ": weight must be [out, in], got shape ", checks::shape(weight));
}

// x [..., in] @ weight [out, in].T
inline void expect_input(const Tensor& x, const MatrixView& in, const Tensor& weight, const MatrixView& w) {
  if (in.cols != w.cols) {
    checks::fail("spu::linear: x ", checks::shape(x), " has ", in.cols, " features but weight ", checks::shape(weight),
                 " takes ", w.cols);
  }
}

inline void expect_bias(const Tensor& bias, const Tensor& weight) {
  if (bias.dim() != 1 || bias.size(0) != weight.size(0)) {
    checks::fail("spu::linear: bias ", checks::shape(bias), " does not fit weight ", checks::shape(weight));
  }
}

// dz [..., out] @ weight [out, in]
inline void expect_output(const char* op, const Tensor& dz, const MatrixView& g, const Tensor& weight,
                          const MatrixView& w) {
  if (g.cols != w.rows) {
    checks::fail("spu::", op, ": dz ", checks::shape(dz), " does not fit weight ", checks::shape(weight));
  }
}

// dz [rows, out].T @ x [rows, in]
inline void expect_rows(const char* op, const Tensor& dz, const MatrixView& g, const Tensor& x, const MatrixView& in) {
  if (g.rows != in.rows) {
    checks::fail("spu::", op, ": dz ", checks::shape(dz), " and x ", checks::shape(x), " have different row counts");
  }
}

// The fp32 buffer of a gradient of numel values; whether it is on the right device is the library's to check.
inline float* main_grad_values(const char* op, const Tensor& main_grad, int64_t numel) {
  checks::expect_dtype(op, "main_grad", main_grad, ScalarType::Float);
  if (!main_grad.is_contiguous() || main_grad.numel() != numel) {
    checks::fail("spu::", op, ": main_grad must be contiguous with ", numel, " values, got shape ",
                 checks::shape(main_grad));
  }
  return static_cast<float*>(main_grad.mutable_data_ptr());
}

}  // namespace spu
