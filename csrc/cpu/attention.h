// The ops of attention.cpp, registered in module.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace spu {
namespace cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, bool causal);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      double scale, bool causal);

}  // namespace cpu
}  // namespace spu
