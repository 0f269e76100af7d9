// Checks at the boundary to torch. The Python ops refuse bad input before dispatch with fuller advice; these keep
// direct callers of torch.ops.spu from reading outside a tensor. Messages name the values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace spu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace checks {

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::invalid_argument(text.str());
}

inline const char* name(ScalarType t) {
  switch (t) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    default:
      return "another dtype";
  }
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void expect_dtype(const char* op, const char* what, const Tensor& t, ScalarType wanted) {
  if (t.scalar_type() != wanted) {
    fail("spu::", op, ": ", what, " must be ", name(wanted), ", got ", name(t.scalar_type()));
  }
}

inline void expect_same_dtype(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                              const Tensor& b) {
  if (a.scalar_type() != b.scalar_type()) {
    fail("spu::", op, ": ", a_name, " is ", name(a.scalar_type()), " but ", b_name, " is ", name(b.scalar_type()),
         "; convert one of them");
  }
}

inline void expect_same_shape(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                              const Tensor& b) {
  if (!same_shape(a, b)) {
    fail("spu::", op, ": ", a_name, " has shape ", shape(a), " but ", b_name, " has ", shape(b));
  }
}

inline void expect_cpu(const char* op, const char* what, const Tensor& t) {
  if (!t.is_cpu()) fail("spu::", op, ": ", what, " must be on the CPU; use a backend of its device");
}

// A one-element fp32 tensor: inv_scale, found_inf, step, grad_scale.
inline void expect_one_value(const char* op, const char* what, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || t.numel() != 1) {
    fail("spu::", op, ": ", what, " must be one float32 value, got ", name(t.scalar_type()), ' ', shape(t));
  }
}

// The same on the CPU.
inline void expect_scalar(const char* op, const char* what, const Tensor& t) {
  expect_cpu(op, what, t);
  expect_one_value(op, what, t);
}

}  // namespace checks
}  // namespace spu
