// Block-wise int8 coding: 64 values share one fp32 scale, absmax / 127.
#pragma once

#include "math/hd.h"

namespace spu {
namespace math {

constexpr int kInt8Block = 64;

// The scale of a block whose largest magnitude is absmax. A block with a non-finite value (absmax NaN) stores NaN;
// a scale below the normal range stores 0, so that no decoder depends on subnormal arithmetic.
SPU_HD float int8_scale(float absmax) {
  const float scale = absmax / 127.0f;
  if (is_nonfinite(scale)) return Ops<float>::from_bits(0x7fc00000u);
  return scale < 1.1754943508e-38f ? 0.0f : scale;
}

// True if values under this scale are divided by it; otherwise (0 or NaN) their codes are 0.
SPU_HD bool int8_scale_codes(float scale) {
  return scale > 0.0f;
}

// Nearest integer of x / scale, ties to even, as a float in [-127, 127].
template <class F>
SPU_HD F int8_code(F x, F scale) {
  using O = Ops<F>;
  F q = (x / scale + round_magic()) - round_magic();
  q = q > 127.0f ? O::splat(127.0f) : q;
  return q < -127.0f ? O::splat(-127.0f) : q;
}

template <class F>
SPU_HD F int8_value(F code, F scale) {
  return code * scale;
}

}  // namespace math
}  // namespace spu
