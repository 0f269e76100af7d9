// The ops of the CPU library, registered in module.cpp: the shared ones, and those that it alone has.
#pragma once

#define SPU_LIBRARY cpu
#include "torch/ops.h"

namespace spu {
namespace cpu {

Tensor gated_dx(Tensor dgate, Tensor dup, Tensor w_gate, Tensor w_up);

std::tuple<Tensor, Tensor> linear_ce(Tensor hidden, Tensor weight, Tensor target, int64_t ignore_index);
Tensor linear_ce_dz(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor grad_rows, int64_t ignore_index);

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, bool causal);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      double scale, bool causal);

}  // namespace cpu
}  // namespace spu
