// The ops of the CUDA library, registered in module.cpp: the shared ones, and those that it alone has.
#pragma once

#define SPU_LIBRARY cuda
#include "torch/ops.h"

namespace spu::cuda {

void pack_into(Tensor x, Text codec, Tensor wire);
void unpack_into(Tensor wire, Text codec, Tensor out);
void copy_in(std::vector<Tensor> sources, std::vector<Tensor> targets);
std::tuple<Tensor, Tensor, Tensor> mlp_dz(Tensor dy, Tensor w_out, Tensor saved, Text activation, bool needs_h,
                                          bool needs_sums);

}  // namespace spu::cuda
