// The ops of cross_entropy.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> linear_ce(Tensor hidden, Tensor weight, Tensor target, int64_t ignore_index);
Tensor linear_ce_dz(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor grad_rows, int64_t ignore_index);

}  // namespace cpu
}  // namespace spu
