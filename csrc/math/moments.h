// AdamW's moments in less memory than fp32: as bf16, or as 8-bit codes with one fp32 scale for 64 values.
//
// They are averages that move by a small share of themselves at a step (a thousandth, for beta2 = 0.999), which
// rounding to nearest would lose for ever: bf16 keeps 8 bits, the codes 4 or 5. So they are rounded stochastically, up
// with the probability of the part that is cut off, and are right on average. The noise is a hash of the step and the
// element's index: a run repeats bit for bit, on every backend.
//
// A code holds the logarithm's leading bits: sign, exponent and mantissa of |value| / scale as an IEEE fp32 pattern has
// them, 3 mantissa bits for the first moment (127 magnitudes, a factor of 2^16 apart at most) and 4 for the second,
// which has no sign (255 magnitudes, the same range). The scale is the largest magnitude of the block, which is kept
// exactly. Logarithmic codes for optimizer states: Dettmers et al., "8-bit optimizers via block-wise quantization"
// (arXiv:2110.02861); the form here is this file's own.
#pragma once

#include "math/codec.h"
#include "math/half.h"
#include "math/wire.h"

namespace spu::math {

enum class Moments : int { fp32 = 0, bf16 = 1, int8 = 2 };

constexpr int kMomentBlock = 64;

// An 8-bit moment is one buffer: the scales of the blocks, padded to 64 bytes, then a byte for each value.
SPU_HD constexpr int64_t moment_scale_bytes(int64_t numel) {
  return wire::padded(4 * ((numel + kMomentBlock - 1) / kMomentBlock));
}
SPU_HD constexpr int64_t moment_bytes(int64_t numel) {
  return moment_scale_bytes(numel) + numel;
}

// One parameter of an AdamW step, all arrays dense: master is its fp32 value or a 16-bit weight's correction, param the
// 16-bit weight (null where the parameter itself is fp32), grad fp32 or bf16, step the number of this update, from 1.
struct AdamWItem {
  void *param, *master;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  const float* step;
  int64_t numel;
};

// All bits of the result depend on all bits of x (the finaliser of A. Appleby's MurmurHash3).
template <class U>
SPU_HD U mix(U x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

SPU_HD uint32_t moment_seed(float step) {
  return mix<uint32_t>(static_cast<uint32_t>(step));
}

// 32 bits for one element of a tensor at a step: the low 16 are for the first moment, the high 16 for the second.
constexpr uint32_t kNoiseStride = 0x9e3779b9u;
template <class U>
SPU_HD U moment_noise(U index, uint32_t seed) {
  return mix<U>(index * kNoiseStride + seed);
}

// noise: 16 bits. A value that is not finite is rounded to nearest, and nothing finite becomes infinite.
template <class F, class U = typename Ops<F>::UInt>
SPU_HD U stochastic_bf16(F x, U noise) {
  const U u = Ops<F>::bits(x), infinity = U{} + 0x7f800000u;
  const U magnitude = u & 0x7fffffffu;
  const U kept = magnitude + noise < infinity ? u + noise : u;
  return magnitude < infinity ? kept >> 16 : float_to_bf16<F>(x);
}

template <bool Signed>
struct MomentCode {
  static constexpr uint32_t kMost = Signed ? 127 : 255;              // the code of 1
  static constexpr int kDrop = Signed ? 20 : 19;                     // bits of a pattern that a code cuts off
  static constexpr uint32_t kBase = (0x3f800000u >> kDrop) - kMost;  // of a pattern's leading bits, code 0
  static constexpr uint32_t kSmallest = (kBase + 1) << kDrop;        // the pattern of code 1
};

// Squares leave fp32 where gradients do not yet: a block with an infinite one is infinite as a whole, with the code of
// 1 for each value. An infinite second moment moves nothing, as in fp32; NaN, as of any other value that is not finite,
// would reach the weights.
template <bool Signed>
SPU_HD float moment_scale(float absmax) {
  return !Signed && Ops<float>::bits(absmax) == 0x7f800000u ? absmax : block_scale(absmax, 1.0f);
}

// The code, without its sign, of a magnitude in units of its scale, which is its block's moment_scale and greater than
// 0; noise: 16 bits. Below the smallest magnitude the first moment is 0 or that magnitude, right on average; the second
// is never rounded to 0, since its root is divided by.
template <bool Signed, class F, class U = typename Ops<F>::UInt>
SPU_HD U moment_size(F units, U noise) {
  using O = Ops<F>;
  using I = typename O::Int;
  using C = MomentCode<Signed>;
  const U magnitude = O::bits(units), one = U{} + 1u, none = U{};
  const U normal = ((magnitude + (noise << (C::kDrop - 16))) >> C::kDrop) - C::kBase;
  if (!Signed) {  // below the smallest magnitude `normal` is at most 1
    const I least = (I)(magnitude < one ? magnitude : one);
    return (U)((I)normal > least ? (I)normal : least);
  }
  const F smallest = O::from_bits(U{} + C::kSmallest);
  const F share = O::from_bits((noise << 7) | 0x3f800000u) - 1.0f;  // [0, 1)
  const U tiny = units > smallest * share ? one : none;
  return magnitude < (U{} + C::kSmallest) ? tiny : normal;
}

// The same, where every magnitude of the first moment is at least the smallest.
template <bool Signed, class F, class U = typename Ops<F>::UInt>
SPU_HD U moment_size_of_large(F units, U noise) {
  using C = MomentCode<Signed>;
  if (!Signed) return moment_size<false, F>(units, noise);
  return ((Ops<F>::bits(units) + (noise << (C::kDrop - 16))) >> C::kDrop) - C::kBase;
}

template <bool Signed, class F, class U = typename Ops<F>::UInt>
SPU_HD U moment_code(F x, F scale, U noise) {
  const U code = moment_size<Signed, F>(abs(x) / scale, noise);
  return Signed ? code | ((Ops<F>::bits(x) >> 24) & 0x80u) : code;
}

// The value of a code in units of its scale; Zeros: whether it may be 0.
template <bool Signed, class F, bool Zeros = true, class U = typename Ops<F>::UInt>
SPU_HD F moment_value(U code) {
  using C = MomentCode<Signed>;
  const U size = Signed ? code & 0x7fu : code;
  const U pattern = (size + C::kBase) << C::kDrop;
  const U none = U{};
  U magnitude = pattern;
  if (Zeros) magnitude = size == none ? none : pattern;
  return Ops<F>::from_bits(Signed ? magnitude | ((code & 0x80u) << 24) : magnitude);
}

}  // namespace spu::math
