// Storage types of tensors.
#pragma once

#include "math/types.h"

namespace spu::cuda {

constexpr int size_of(Type type) {
  return type == Type::fp32 ? 4 : 2;
}

}  // namespace spu::cuda
