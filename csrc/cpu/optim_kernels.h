// AdamW in one pass and sums of squares. Included in the namespace of an instruction set.
#pragma once

#include "cpu/optim_values.h"

namespace spu::SPU_ISA_NS {

// root / by as the division rounds it, from inv = 1 / by, as `quotient`. A core has one divider for vectors, which the
// root and the update's own division keep busy for 40 cycles; this one would be 16 more, for which all else waits. The
// bias correction is 0 or at least 1e-8, a root 0 or at least 2^-75, so that no remainder underflows; that of an
// infinite quotient is NaN.
SPU_INLINE vf corrected_root(vf root, float by, float inv) {
  if (!SPU_EXACT_FMA) return root / by;
  const vf q = root * inv, corrected = O::fma(O::fma(-q, O::splat(by), root), O::splat(inv), q);
  return q < O::from_bits(vu{} + 0x7f800000u) ? corrected : q;
}

// Moments below these are read as 0. Without a gradient (an embedding's rare tokens) a moment decays until it is a
// denormal value, and stays one: 0.9 times the fourth of them is, rounded, the fourth again. Each step of its vector
// then takes 150 cycles and more, for ever. Bounds by fp32's patterns: 2^-98, so that m times the step's size is no
// denormal either, and 2^-124. With eps from 2^-32 on such a second moment changes no bit of root + eps, and such a
// first one a weight by less than 2^-62 of the rate; below that eps nothing is left out.
constexpr int32_t kLeastFirst = (127 - 98) << 23, kLeastSecond = (127 - 124) << 23;
constexpr float kLeastEps = 0x1p-32f;

SPU_INLINE vf settled(vf moment, int32_t least) {
  const vi magnitude = (vi)(O::bits(moment) & 0x7fffffffu);
  return magnitude < least ? vf{} : moment;
}

// `blocks` of kMomentBlock values from `at`; one of fewer with a tail.
template <Moments M, class Kept>
SPU_INLINE void adamw_chunk(const cpu::AdamWRange& r, const math::AdamWStep& k, int64_t at, int blocks, Tail* tail) {
  Moment<M, true> first(r.exp_avg, r.numel, at);
  Moment<M, false> second(r.exp_avg_sq, r.numel, at);
  Kept kept(r, at);
  const float* grad = static_cast<const float*>(r.grad) + at;
  alignas(64) float widened[kChunkVectors * kLanes];
  if (r.grad_type == Type::bf16) {
    const Bf16* half = static_cast<const Bf16*>(r.grad) + at;
    if (tail) tail->take(half);
    for (int i = 0; i < blocks * kMomentVectors; ++i) {
      fetch(half, i);
      store(widened + i * kLanes, load(half + i * kLanes));
    }
    grad = widened;
  } else if (tail) {
    tail->take(grad);
  }
  if (tail) {
    first.shift(*tail);
    second.shift(*tail);
    kept.shift(*tail);
  }
  vf p[kChunkVectors], m[kChunkVectors], v[kChunkVectors];
  vu noises[kChunkVectors];
  if constexpr (M == Moments::int8) first.read_all(blocks, m);
  if constexpr (M == Moments::int8) second.read_all(blocks, v);
  if constexpr (Kept::staged) kept.read_all(blocks, p);
  constexpr bool rounds = M != Moments::fp32 || Kept::rounds;
  const float inv_bias2_sqrt = 1.0f / k.bias2_sqrt;
  const int32_t settles = k.eps >= kLeastEps, least_first = settles * kLeastFirst,
                least_second = settles * kLeastSecond;
  const vu strides =
      noise_strides(typename MakeLanes<kLanes>::type{}) + (static_cast<uint32_t>(at) * math::kNoiseStride + r.seed);
#pragma GCC unroll 2
  for (int i = 0; i < blocks * kMomentVectors; ++i) {
    math::AdamWState<vf> s;
    if constexpr (Kept::staged) s.param = p[i];
    if constexpr (!Kept::staged) s.param = kept.read(i);
    if constexpr (M == Moments::int8) s.m = m[i], s.v = v[i];
    if constexpr (M != Moments::int8) s.m = first.read(i), s.v = second.read(i);
    s.m = settled(s.m, least_first), s.v = settled(s.v, least_second);
    s = math::adamw_moments<vf>(s, load(grad + i * kLanes) * r.grad_scale, k);
    s.param = math::adamw_param<vf>(s, corrected_root(O::sqrt(s.v), k.bias2_sqrt, inv_bias2_sqrt), k);
    const vu noise = rounds ? math::mix<vu>(strides + static_cast<uint32_t>(i * kLanes) * math::kNoiseStride) : vu{};
    if (rounds) noises[i] = noise;
    fetch(grad, i);
    first.ahead(i);
    second.ahead(i);
    kept.ahead(i);
    if constexpr (Kept::staged) p[i] = s.param;
    if constexpr (!Kept::staged) kept.write(i, s.param);
    if constexpr (M == Moments::int8) m[i] = s.m, v[i] = s.v;
    if constexpr (M != Moments::int8) first.write(i, s.m, noise), second.write(i, s.v, noise);
  }
  if constexpr (Kept::staged) kept.write_all(blocks, p, rounds ? noises : nullptr);
  if constexpr (M == Moments::int8) first.write_all(blocks, m, noises);
  if constexpr (M == Moments::int8) second.write_all(blocks, v, noises);
}

template <Moments M, class Kept>
static void adamw_blocks(const cpu::AdamWRange& range, const math::AdamWStep& step, int64_t begin, int64_t end) {
  const cpu::AdamWRange r = range;
  const math::AdamWStep k = step;
  const int64_t whole = least(end, r.numel / math::kMomentBlock);
  for (int64_t b = begin; b < whole; b += kChunkBlocks) {
    adamw_chunk<M, Kept>(r, k, b * math::kMomentBlock, static_cast<int>(least(kChunkBlocks, whole - b)), nullptr);
  }
  if (end > whole) {
    Tail tail(r.numel - whole * math::kMomentBlock);
    adamw_chunk<M, Kept>(r, k, whole * math::kMomentBlock, 1, &tail);
    tail.finish();
  }
}

template <class Kept>
static void adamw_of(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (r.moments == Moments::fp32) return adamw_blocks<Moments::fp32, Kept>(r, step, begin, end);
  if (r.moments == Moments::bf16) return adamw_blocks<Moments::bf16, Kept>(r, step, begin, end);
  return adamw_blocks<Moments::int8, Kept>(r, step, begin, end);
}

template <class T>
static void adamw_half(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (r.kept == Master::fp32) return adamw_of<WithMaster<T>>(r, step, begin, end);
  if (r.kept == Master::bits16) return adamw_of<WithCorrection<T, Master::bits16>>(r, step, begin, end);
  return adamw_of<WithCorrection<T, Master::bits8>>(r, step, begin, end);
}

static void adamw(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (!r.param) return adamw_of<OwnValue>(r, step, begin, end);
  if (r.param_type == Type::fp16) return adamw_half<Fp16>(r, step, begin, end);
  return adamw_half<Bf16>(r, step, begin, end);
}

// Squares are taken in fp64: those of fp32 gradients above 1.8e19 or below 1e-19 leave fp32's range.
static double square_sum(const float* x, int64_t begin, int64_t end) {
  constexpr int half = kLanes / 2;
  vd sum[4] = {};
  int64_t i = begin;
  for (; i + 4 * half <= end; i += 4 * half) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vd d = __builtin_convertvector(load_raw<vf_half>(x + i + j * half), vd);
      sum[j] += d * d;
    }
  }
  double total = 0;
  for (; i < end; ++i) total += static_cast<double>(x[i]) * x[i];
  const vd all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int j = 0; j < half; ++j) total += all[j];
  return total;
}

}  // namespace spu::SPU_ISA_NS
