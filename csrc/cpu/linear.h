// The ops of linear.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace spu {
namespace cpu {

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

}  // namespace cpu
}  // namespace spu
