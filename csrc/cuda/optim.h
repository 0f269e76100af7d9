// AdamW and squared norms over lists of tensors: one launch serves up to kGroup of them. All arrays are dense.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda/device.h"
#include "cuda/types.h"
#include "math/moments.h"

namespace spu::cuda {

struct AdamWSettings {
  double lr, beta1, beta2, eps, weight_decay;
  const float *grad_scale, *found_inf;  // in device memory; nothing happens where found_inf is set
};

void launch_adamw(Type param_type, math::Moments moments, const std::vector<math::AdamWItem>& tensors,
                  const AdamWSettings& settings, cudaStream_t stream);

struct Values1d {
  const float* data;
  int64_t numel;
};

// Partial sums that launch_square_sum needs room for, in doubles.
int64_t square_sum_pieces(const std::vector<Values1d>& tensors);

// *out = the sum of the squares of all values, accumulated in fp64 in an order that depends on the sizes alone.
void launch_square_sum(const std::vector<Values1d>& tensors, double* partial, double* out, cudaStream_t stream);

}  // namespace spu::cuda
