// Storage types of tensors.
#pragma once

namespace spu {
namespace cuda {

enum class Type : int { fp16 = 0, bf16 = 1, fp32 = 2 };  // the numbers of wire::Source

constexpr int size_of(Type type) {
  return type == Type::fp32 ? 4 : 2;
}

}  // namespace cuda
}  // namespace spu
