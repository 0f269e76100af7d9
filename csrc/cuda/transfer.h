// Copies between pinned host memory and the device by loads and stores of a kernel, converted on the way.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda/device.h"
#include "cuda/types.h"

namespace spu::cuda {

// numel values, dense on both sides; either may lie in pinned host memory, at its address on the device.
struct Copy {
  const void* source;
  void* target;
  Type from, to;
  int64_t numel;
};

// One launch for up to kGroup copies of one pair of types.
void launch_copies(const std::vector<Copy>& copies, cudaStream_t stream);

}  // namespace spu::cuda
