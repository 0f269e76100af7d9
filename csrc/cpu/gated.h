// The ops of gated.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> gated_linear(Tensor x, Tensor w_gate, Tensor w_up, std::string activation,
                                                bool keep);
std::tuple<Tensor, Tensor, Tensor> gated_dz(Tensor dh, Tensor gate, Tensor up, std::string activation);
Tensor gated_dx(Tensor dgate, Tensor dup, Tensor w_gate, Tensor w_up);

}  // namespace cpu
}  // namespace spu
