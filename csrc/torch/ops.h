// The ops that both libraries have, and their registration. SPU_LIBRARY, cpu or cuda, names the library: its namespace
// and its overloads. spu.ops.schema defines the schemas.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch/text.h"

#define SPU_OVERLOAD_OF(library) #library
#define SPU_OVERLOAD(library) "." SPU_OVERLOAD_OF(library)
#define SPU_IMPL(m, name, function) (m).impl(name SPU_OVERLOAD(SPU_LIBRARY), TORCH_BOX(&function))

namespace spu::SPU_LIBRARY {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Text activation,
                                  bool keep_preact);
Tensor linear_dz(Tensor dy, Tensor saved, Text activation);
Tensor linear_dx(Tensor dz, Tensor weight);
Tensor linear_dw(Tensor dz, Tensor x);
Tensor linear_db(Tensor dz);
void linear_dw_sink(Tensor dz, Tensor x, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);
void linear_db_sink(Tensor dz, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);
void unscale(Tensor grad, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate);

std::tuple<Tensor, Tensor, Tensor> gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Text activation, bool keep);
std::tuple<Tensor, Tensor, Tensor> gated_dz(Tensor dh, Tensor gate, Tensor up, Text activation);

Tensor pack(Tensor x, Text codec);
Tensor unpack(Tensor wire, std::vector<int64_t> shape, torch::headeronly::ScalarType dtype, Text codec);

// Lists of one length, but masters: empty for fp32 parameters. All parameters have one dtype.
void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay);
Tensor grad_sqnorm(std::vector<Tensor> grads);

template <class Library>
void register_shared(Library& m) {
  SPU_IMPL(m, "linear", linear);
  SPU_IMPL(m, "linear_dz", linear_dz);
  SPU_IMPL(m, "linear_dx", linear_dx);
  SPU_IMPL(m, "linear_dw", linear_dw);
  SPU_IMPL(m, "linear_db", linear_db);
  SPU_IMPL(m, "linear_dw_", linear_dw_sink);
  SPU_IMPL(m, "linear_db_", linear_db_sink);
  SPU_IMPL(m, "unscale_", unscale);
  SPU_IMPL(m, "gated_linear", gated_linear);
  SPU_IMPL(m, "gated_dz", gated_dz);
  SPU_IMPL(m, "pack", pack);
  SPU_IMPL(m, "unpack", unpack);
  SPU_IMPL(m, "adamw_", adamw);
  SPU_IMPL(m, "grad_sqnorm", grad_sqnorm);
}

}  // namespace spu::SPU_LIBRARY
