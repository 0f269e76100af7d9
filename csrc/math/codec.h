// Block-wise coding: 64 values (int4: 32) share one fp32 scale, absmax / (the largest code's magnitude).
#pragma once

#include "math/hd.h"

namespace spu::math {

constexpr int kInt8Block = 64, kInt4Block = 32, kFp8Block = 64;
constexpr float kInt4Largest = 7.0f, kE4m3Largest = 448.0f, kE5m2Largest = 57344.0f;

// The scale of a block whose largest magnitude is absmax. A block with a non-finite value (absmax NaN) stores NaN;
// a scale below the normal range stores 0, so that no decoder depends on subnormal arithmetic.
SPU_HD float block_scale(float absmax, float largest) {
  const float scale = absmax / largest;
  if (is_nonfinite(scale)) return Ops<float>::from_bits(0x7fc00000u);
  return scale < 1.1754943508e-38f ? 0.0f : scale;
}
SPU_HD float int8_scale(float absmax) {
  return block_scale(absmax, 127.0f);
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

// Nearest integer of x / scale in [-7, 7], ties to even, as a float.
template <class F>
SPU_HD F int4_code(F x, F scale) {
  using O = Ops<F>;
  F q = (x / scale + round_magic()) - round_magic();
  q = q > kInt4Largest ? O::splat(kInt4Largest) : q;
  return q < -kInt4Largest ? O::splat(-kInt4Largest) : q;
}

// fp8 with Mantissa bits and exponent bias Bias (e4m3fn: 3, 7; e5m2: 2, 15) as the low 8 bits of 32-bit lanes. Rounds
// x / scale to nearest even, saturating at the largest finite code; subnormals by adding a power of two whose last
// place is theirs.
template <int Mantissa, int Bias, class F, class U = typename Ops<F>::UInt>
SPU_HD U fp8_code(F x, F scale, float largest) {
  using O = Ops<F>;
  const U u = O::bits(x / scale);
  const U sign = (u >> 24) & 0x80u;
  F a = O::from_bits(u & 0x7fffffffu);
  a = a > largest ? O::splat(largest) : a;
  constexpr int drop = 23 - Mantissa;
  const U bits = O::bits(a);
  const U rounded = (bits + ((1u << (drop - 1)) - 1u) + ((bits >> drop) & 1u)) >> drop;
  const U normal = rounded - (static_cast<uint32_t>(127 - Bias) << Mantissa);
  // 2^(24 - Bias - Mantissa): one unit in its last place is the subnormals' step, 2^(1 - Bias - Mantissa).
  constexpr uint32_t magic = static_cast<uint32_t>(127 + 24 - Bias - Mantissa) << 23;
  const U tiny = O::bits(a + O::from_bits(U{} + magic)) - magic;
  const U smallest_normal = U{} + (static_cast<uint32_t>(128 - Bias) << 23);
  return sign | (bits < smallest_normal ? tiny : normal);
}

// The value of a finite code, in units of the scale.
template <int Mantissa, int Bias, class F>
SPU_HD F fp8_value(typename Ops<F>::UInt code) {
  using O = Ops<F>;
  using U = typename O::UInt;
  constexpr uint32_t smallest = static_cast<uint32_t>(128 - Bias) << 23;  // 2^(1 - Bias)
  const U sign = (code & 0x80u) << 24;
  const U em = (code & 0x7fu) << (23 - Mantissa);
  const U normal = em + (static_cast<uint32_t>(127 - Bias) << 23);
  const U tiny = O::bits(O::from_bits(em + smallest) - O::from_bits(U{} + smallest));
  const U out = em < (U{} + (1u << 23)) ? tiny : normal;
  return O::from_bits(out | sign);
}

}  // namespace spu::math
