// Storage types of tensors.
#pragma once

#include "math/types.h"

namespace spu {
namespace cuda {

constexpr int size_of(Type type) {
  return type == Type::fp32 ? 4 : 2;
}

}  // namespace cuda
}  // namespace spu
