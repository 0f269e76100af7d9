// The ops of op_*.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace spu {
namespace cuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation,
                                  bool keep_preact);
Tensor linear_dz(Tensor dy, Tensor saved, std::string activation);
Tensor linear_dx(Tensor dz, Tensor weight);
Tensor linear_dw(Tensor dz, Tensor x);
Tensor linear_db(Tensor dz);
void linear_dw_sink(Tensor dz, Tensor x, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);
void linear_db_sink(Tensor dz, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);
void unscale(Tensor grad, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);

std::tuple<Tensor, Tensor, Tensor> gated_dz(Tensor dh, Tensor gate, Tensor up, std::string activation);

std::tuple<Tensor, Tensor, Tensor> gated_linear(Tensor x, Tensor w_gate, Tensor w_up, std::string activation,
                                                bool keep);

Tensor pack(Tensor x, std::string codec);
void pack_into(Tensor x, std::string codec, Tensor wire);
void unpack_into(Tensor wire, std::string codec, Tensor out);
void copy_in(std::vector<Tensor> sources, std::vector<Tensor> targets);
Tensor unpack(Tensor wire, std::vector<int64_t> shape, torch::headeronly::ScalarType dtype, std::string codec);

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay);
Tensor grad_sqnorm(std::vector<Tensor> grads);

}  // namespace cuda
}  // namespace spu
