// Storage types of tensors, with the numbers that the wire's header has for them.
#pragma once

namespace spu {

enum class Type : int { fp16 = 0, bf16 = 1, fp32 = 2 };

}  // namespace spu
