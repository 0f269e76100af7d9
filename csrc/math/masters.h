// The fp32 master of a 16-bit weight, kept as the weight and a correction of 16 or 8 bits.
//
// X is the format with the weight's exponent and Bits more mantissa bits: fp32 itself for bf16 and 16. The pattern of a
// magnitude in X, an integer, is its size. The weight's pattern is the size's upper bits, rounded to nearest, and
//
//     size = (the weight's pattern without its sign) * 2^Bits + correction.
//
// spu.ops.masters defines what is exact and what is rounded, with which bounds; nothing here depends on subnormal
// arithmetic. The idea is FlashOptim's (arXiv:2602.23349), the encoding is this file's own.
#pragma once

#include "math/half.h"
#include "math/hd.h"

namespace spu::math {

enum class Master : int { fp32 = 0, bits16 = 1, bits8 = 2 };

// A 16-bit pattern, and a correction of which the low Bits are kept; both in 32-bit lanes.
template <class F>
struct Corrected {
  typename Ops<F>::UInt weight;
  typename Ops<F>::Int correction;
};

constexpr uint32_t kFp16Bias = 112u << 23;         // an exponent of fp16 in the place of fp32's
constexpr uint32_t kFp16Least = 113u << 23;        // the fp32 pattern of 2^-14
constexpr uint32_t kFp16LargestKept = 0x47800fff;  // of 65,567.99: masters of fp16 weights end there
constexpr int32_t kFp16Largest8 = 0x7c007f;        // the size of the largest one with 8 bits

// A weight that was written since is joined with the old correction: the master then rounds to it, or is it.
template <bool Fp16, int Bits, class F>
SPU_HD F joined(typename Ops<F>::UInt weight, typename Ops<F>::Int correction) {
  using O = Ops<F>;
  using U = typename O::UInt;
  using I = typename O::Int;
  const F written = O::from_bits(weight << 16);
  if (!Fp16) {  // a correction below 0 or beyond infinity makes a NaN
    const F value = O::from_bits((weight << 16) + ((U)correction << (16 - Bits)));
    return value == value ? value : written;
  }
  const I none = I{};
  const I magnitude = (I)(weight & 0x7fffu);
  const I sum = (magnitude << Bits) + correction;
  const I size = sum > none ? sum : none;
  // With 16 bits fp32 keeps the upper 23 of 26 mantissa bits; the others are 0, or 1s that stand for one more.
  const I wide = Bits == 16 ? (size + 1) >> 3 : size << 5;
  const U tiny = O::bits(O::of_int(size) * (Bits == 16 ? 0x1p-40f : 0x1p-32f));
  const U nan = U{} + 0x7fc00000u;
  U value = size < (I{} + (1 << (10 + Bits))) ? tiny : (U)wide + kFp16Bias;
  value = magnitude > (I{} + 0x7c00) ? nan : value;
  return O::from_bits(value | ((weight & 0x8000u) << 16));
}

// noise: 8 random bits for a correction of 8; one of 16 is not rounded, or to nearest even.
template <bool Fp16, int Bits, class F>
SPU_HD Corrected<F> split(F master, typename Ops<F>::UInt noise) {
  using O = Ops<F>;
  using U = typename O::UInt;
  using I = typename O::Int;
  const I none = I{}, infinity = I{} + 0x7f800000;
  const U u = O::bits(master), sign = (u >> 16) & 0x8000u;
  const I magnitude = (I)(u & 0x7fffffffu);
  U weight;
  I rest;
  if (!Fp16 && Bits == 16) {
    weight = (u + 0x8000u) >> 16;
    rest = (I)u;
  } else if (!Fp16) {
    const U size = (magnitude + (I)noise < infinity ? u + noise : u) >> 8;  // with the sign on top
    weight = (size + 0x80u) >> 8;
    rest = (I)size;
  } else {
    const I largest = I{} + static_cast<int32_t>(kFp16LargestKept);
    const I least = I{} + static_cast<int32_t>(kFp16Least);
    const I kept = magnitude < largest ? magnitude : largest;
    const I normal = kept - static_cast<int32_t>(kFp16Bias);
    const I units = O::nearest_int(O::from_bits((U)kept) * 0x1p40f);  // of 2^-40, for magnitudes below 2^-14
    if (Bits == 16) {
      const I size = kept < least ? units : normal << 3;
      const I upper = (size + 0x7fff + ((size >> 16) & 1)) >> 16;
      const I left = size - (upper << 16), most = I{} + 0x7fff;
      weight = (U)upper | sign;
      rest = left < most ? left : most;
    } else {
      const I sized = kept < least ? (units + (I)noise) >> 8 : (normal + (I)(noise >> 3)) >> 5;
      const I most = I{} + kFp16Largest8;
      rest = sized < most ? sized : most;
      weight = ((U)(rest + 0x80) >> 8) | sign;
    }
  }
  const auto is_nan = magnitude > infinity;
  const U nan = (U{} + (Fp16 ? 0x7e00u : 0x7fc0u)) | sign;
  return {is_nan ? nan : weight, is_nan ? none : rest};
}

// The usual case of both, for a part of the work. A master is usual that is finite and, beside fp16, within the normal
// numbers that round to finite ones, and no tie with 16 bits; a weight that is above 2^-14 and finite.
constexpr uint32_t kUsualLeast = kFp16Least, kUsualEnd = 0x477ff000;  // of fp16's masters: 2^-14 to 65520
constexpr uint32_t kUsualWeight = kFp16Least + (1u << 13), kUsualWeightEnd = 0x47800000;
constexpr uint32_t kUsualEndBf16 = 0x7f800000u - 255;

template <int Bits, class F>
SPU_HD F joined_usual_fp16(F weight, typename Ops<F>::Int correction) {
  using O = Ops<F>;
  return O::from_bits(O::bits(weight) + (typename O::UInt)(Bits == 16 ? (correction + 1) >> 3 : correction << 5));
}

template <bool Fp16, int Bits, class F>
SPU_HD Corrected<F> split_usual(F master, typename Ops<F>::UInt noise) {
  using U = typename Ops<F>::UInt;
  using I = typename Ops<F>::Int;
  const U u = Ops<F>::bits(master);
  if (!Fp16 && Bits == 16) return {(u + 0x8000u) >> 16, (I)u};
  if (!Fp16) {
    const U size = (u + noise) >> 8;
    return {(size + 0x80u) >> 8, (I)size};
  }
  if (Bits == 16) return {float_to_fp16<F>(master), (I)(u << 3)};
  const U size = ((u & 0x7fffffffu) - kFp16Bias + (noise >> 3)) >> 5;
  return {((size + 0x80u) >> 8) | ((u >> 16) & 0x8000u), (I)size};
}

// The 8 of an element's 32 random bits that round its correction: those that matter least to the two moments.
template <class U>
SPU_HD U master_noise(U noise) {
  return (noise >> 12) & 0xffu;
}

}  // namespace spu::math
