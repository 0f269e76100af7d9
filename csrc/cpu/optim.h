// The ops of optim.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

void adamw(Tensor param, Tensor grad, std::optional<Tensor> master, Tensor exp_avg, Tensor exp_avg_sq, Tensor step,
           Tensor grad_scale, Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay);
Tensor grad_sqnorm(Tensor grad);

}  // namespace cpu
}  // namespace spu
