// The ops of codec.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

Tensor pack(Tensor x, std::string codec);
Tensor unpack(Tensor wire, std::vector<int64_t> shape, torch::headeronly::ScalarType dtype, std::string codec);

}  // namespace cpu
}  // namespace spu
