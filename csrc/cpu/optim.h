// The ops of optim.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

// Lists of one length, but masters: empty for fp32 parameters. All parameters have one dtype.
void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay);
Tensor grad_sqnorm(std::vector<Tensor> grads);

}  // namespace cpu
}  // namespace spu
