// AdamW in one pass and sums of squares. Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "math/masters.h"
#include "math/moments.h"

namespace spu {
namespace SPU_ISA_NS {

using math::Master;
using math::Moments;
constexpr int kMomentVectors = math::kMomentBlock / kLanes;

template <bool First, class A, class B>
struct Pick {
  using type = A;
};
template <class A, class B>
struct Pick<false, A, B> {
  using type = B;
};

template <int... I>
SPU_INLINE vu noise_strides(Lanes<I...>) {
  return (vu){uint32_t(I) * math::kNoiseStride...};
}

// Copies of the last values of a tensor, zeros behind them, so that the kernels below see whole blocks only.
struct Tail {
  int64_t n;
  int used;
  struct {
    void* target;
    size_t bytes;
    alignas(64) unsigned char values[4 * math::kMomentBlock];
  } copies[5];

  explicit Tail(int64_t count) : n(count), used(0) {}
  template <class P>
  void take(P*& p) {
    auto& copy = copies[used++];
    copy.target = const_cast<void*>(static_cast<const void*>(p));
    copy.bytes = sizeof(P) * static_cast<size_t>(n);
    memset(copy.values, 0, sizeof copy.values);
    memcpy(copy.values, p, copy.bytes);
    p = reinterpret_cast<P*>(copy.values);
  }
  // The first array is only read.
  void finish() const {
    for (int i = 1; i < used; ++i) memcpy(copies[i].target, copies[i].values, copies[i].bytes);
  }
};

// One moment at a block: how its values are read, and written with 16 bits of noise each.
template <Moments M, bool Signed>
struct Moment {
  using T = typename Pick<M == Moments::fp32, float, Bf16>::type;
  T* data;
  Moment(void* p, int64_t, int64_t at) : data(static_cast<T*>(p) + at) {}
  void shift(Tail& tail) { tail.take(data); }

  void read(vf* x) const {
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) x[i] = load(data + i * kLanes);
  }
  void write(const vf* x, const vu* noise) const {
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) {
      // a pattern without low bits: the store rounds no more
      const vf rounded = M == Moments::fp32 ? x[i] : O::from_bits(math::stochastic_bf16<vf>(x[i], noise[i]) << 16);
      store(data + i * kLanes, rounded);
    }
  }
};

template <bool Signed>
struct Moment<Moments::int8, Signed> {
  float* scale;
  uint8_t* codes;
  Moment(void* p, int64_t numel, int64_t at)
      : scale(static_cast<float*>(p) + at / math::kMomentBlock),
        codes(static_cast<uint8_t*>(p) + math::moment_scale_bytes(numel) + at) {}
  void shift(Tail& tail) { tail.take(codes); }

  void read(vf* x) const {
    const vf unit = O::splat(*scale);
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) {
      x[i] = math::moment_value<Signed, vf>(load_bytes(codes + i * kLanes)) * unit;
    }
  }
  void write(vf (&x)[kMomentVectors], const vu* noise) const {
    const float unit = math::moment_scale(block_absmax(x));
    *scale = unit;
    if (!(unit > 0.0f)) {
      memset(codes, 0, math::kMomentBlock);
      return;
    }
    divide_block(x, unit);
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) {
      store_bytes(codes + i * kLanes, math::moment_code_of<Signed, vf>(x[i], noise[i]));
    }
  }
};

// The fp32 value that is updated, at a block: an fp32 parameter, a master, or a 16-bit weight with a correction.
struct OwnValue {
  static constexpr bool rounds = false;
  float* value;
  OwnValue(const cpu::AdamWRange& r, int64_t at) : value(static_cast<float*>(r.master) + at) {}
  void shift(Tail& tail) { tail.take(value); }
  vf read(int i) const { return load(value + i * kLanes); }
  void write(int i, vf x, vu) const { store(value + i * kLanes, x); }
};

template <class T>
struct WithMaster {
  static constexpr bool rounds = false;
  T* weight;
  float* master;
  WithMaster(const cpu::AdamWRange& r, int64_t at)
      : weight(static_cast<T*>(r.param) + at), master(static_cast<float*>(r.master) + at) {}
  void shift(Tail& tail) {
    tail.take(weight);
    tail.take(master);
  }
  vf read(int i) const {
    const vf value = load(master + i * kLanes);
    return math::following<vf>(value, rounded_to<T>(value), load(weight + i * kLanes));
  }
  void write(int i, vf x, vu) const {
    store(master + i * kLanes, x);
    store(weight + i * kLanes, x);
  }
};

template <class T, Master K>
struct WithCorrection {
  static constexpr bool rounds = K == Master::bits8;
  static constexpr int bits = K == Master::bits8 ? 8 : 16;
  using C = typename Pick<rounds, int8_t, int16_t>::type;
  T* weight;
  C* correction;
  WithCorrection(const cpu::AdamWRange& r, int64_t at)
      : weight(static_cast<T*>(r.param) + at), correction(static_cast<C*>(r.master) + at) {}
  void shift(Tail& tail) {
    tail.take(weight);
    tail.take(correction);
  }
  vf read(int i) const {
    const vu pattern = load_words(reinterpret_cast<const uint16_t*>(weight) + i * kLanes);
    if constexpr (rounds) {
      return math::joined<T::is_fp16, bits, vf>(pattern, load_codes(correction + i * kLanes));
    } else {
      return math::joined<T::is_fp16, bits, vf>(pattern, load_words(correction + i * kLanes));
    }
  }
  void write(int i, vf x, vu noise) const {
    const math::Corrected<vf> s = math::split<T::is_fp16, bits, vf>(x, math::master_noise(noise));
    store_words(weight + i * kLanes, s.weight);
    if constexpr (rounds) {
      store_bytes(reinterpret_cast<uint8_t*>(correction) + i * kLanes, (vu)s.correction & 0xffu);
    } else {
      store_words(correction + i * kLanes, (vu)s.correction);
    }
  }
};

// A block of kMomentBlock values from `at`; of fewer with a tail.
template <Moments M, class Kept>
SPU_INLINE void adamw_block(const cpu::AdamWRange& r, const math::AdamWStep& k, int64_t at, Tail* tail) {
  Moment<M, true> first(r.exp_avg, r.numel, at);
  Moment<M, false> second(r.exp_avg_sq, r.numel, at);
  Kept kept(r, at);
  const float* grad = r.grad + at;
  if (tail) {
    tail->take(grad);
    first.shift(*tail);
    second.shift(*tail);
    kept.shift(*tail);
  }
  vf m[kMomentVectors], v[kMomentVectors];
  vu low[kMomentVectors], high[kMomentVectors];
  first.read(m);
  second.read(v);
#pragma GCC unroll 16
  for (int i = 0; i < kMomentVectors; ++i) {
    const vf g = load(grad + i * kLanes) * r.grad_scale;
    const math::AdamWState<vf> s = math::adamw_step<vf>({kept.read(i), m[i], v[i]}, g, k);
    m[i] = s.m;
    v[i] = s.v;
    const uint32_t number = static_cast<uint32_t>(at + i * kLanes) * math::kNoiseStride + r.seed;
    const bool rounds = M != Moments::fp32 || Kept::rounds;
    const vu noise = rounds ? math::mix<vu>(noise_strides(typename MakeLanes<kLanes>::type{}) + number) : vu{};
    kept.write(i, s.param, noise);
    low[i] = noise & 0xffffu;
    high[i] = noise >> 16;
  }
  first.write(m, low);
  second.write(v, high);
}

template <Moments M, class Kept>
static void adamw_blocks(const cpu::AdamWRange& range, const math::AdamWStep& step, int64_t begin, int64_t end) {
  const cpu::AdamWRange r = range;
  const math::AdamWStep k = step;
  const int64_t whole = least(end, r.numel / math::kMomentBlock);
  for (int64_t b = begin; b < whole; ++b) adamw_block<M, Kept>(r, k, b * math::kMomentBlock, nullptr);
  if (end > whole) {
    Tail tail(r.numel - whole * math::kMomentBlock);
    adamw_block<M, Kept>(r, k, whole * math::kMomentBlock, &tail);
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

}  // namespace SPU_ISA_NS
}  // namespace spu
