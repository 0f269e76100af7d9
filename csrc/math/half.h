// fp16 and bf16 bit patterns to and from fp32, by integer arithmetic, in 32-bit lanes (F's unsigned integers).
// Round to nearest even; subnormals are kept also when the thread flushes denormals (torch.set_flush_denormal).
// F. Giesen, "Float->half conversions" (2012) explains the method.
#pragma once

#include "math/hd.h"

namespace spu::math {

template <class F, class U = typename Ops<F>::UInt>
SPU_HD F fp16_to_float(U h) {
  using O = Ops<F>;
  const U sign = (h & 0x8000u) << 16;
  const U em = (h & 0x7fffu) << 13;
  const U normal = em + (112u << 23);
  // Subnormal: put the mantissa under an exponent of 2^-14 and subtract that power; both are normal floats.
  const U tiny = O::bits(O::from_bits(em + (113u << 23)) - 6.103515625e-05f);
  const U special = em | 0x7f800000u;
  U out = em < (1u << 23) ? tiny : normal;
  out = em >= (0x7c00u << 13) ? special : out;
  return O::from_bits(out | sign);
}

template <class F, class U = typename Ops<F>::UInt>
SPU_HD U float_to_fp16(F x) {
  using O = Ops<F>;
  const U u = O::bits(x);
  const U sign = (u >> 16) & 0x8000u;
  const U a = u & 0x7fffffffu;
  const U odd = (a >> 13) & 1u;
  const U normal = (a - (112u << 23) + 0xfffu + odd) >> 13;  // the carry of 65520 and above ends at inf
  // Below 2^-14: adding 0.5 aligns the mantissa so that the adder rounds it to a multiple of 2^-24.
  const U tiny = O::bits(O::from_bits(a) + 0.5f) - 0x3f000000u;
  const U special = (a > (U{} + 0x7f800000u)) ? (U{} + 0x7e00u) : (U{} + 0x7c00u);
  U out = a < (U{} + (113u << 23)) ? tiny : normal;
  out = a >= (U{} + (143u << 23)) ? special : out;  // 2^16 and above
  return out | sign;
}

template <class F, class U = typename Ops<F>::UInt>
SPU_HD F bf16_to_float(U h) {
  return Ops<F>::from_bits(h << 16);
}

template <class F, class U = typename Ops<F>::UInt>
SPU_HD U float_to_bf16(F x) {
  const U u = Ops<F>::bits(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x != x ? (U{} + 0x7fc0u) : rounded;
}

}  // namespace spu::math
