// AdamW in one pass and sums of squares. Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "math/moments.h"

namespace spu {
namespace SPU_ISA_NS {

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
SPU_INLINE vu lane_numbers(Lanes<I...>) {
  return (vu){uint32_t(I)...};
}

// Vector i of a block of n values; all of it exists if Whole, else missing values read as 0 and are not written.
template <bool Whole, class T>
SPU_INLINE vf take(const T* block, int i, int64_t n) {
  const int64_t left = n - i * kLanes;
  if (Whole || left >= kLanes) return load(block + i * kLanes);
  return left > 0 ? load_some(block + i * kLanes, left) : vf{};
}
template <bool Whole, class T>
SPU_INLINE void put(T* block, int i, int64_t n, vf x) {
  const int64_t left = n - i * kLanes;
  if (Whole || left >= kLanes) return store(block + i * kLanes, x);
  if (left > 0) store_some(block + i * kLanes, x, left);
}

// One moment of a tensor: how n values from `at` are read, and written with 16 bits of noise each.
template <Moments M, bool Signed>
struct Moment {
  using T = typename Pick<M == Moments::fp32, float, Bf16>::type;
  T* data;
  Moment(void* p, int64_t) : data(static_cast<T*>(p)) {}

  template <bool Whole>
  void read(int64_t at, int64_t n, vf* x) const {
    for (int i = 0; i < kMomentVectors; ++i) x[i] = take<Whole>(data + at, i, n);
  }
  template <bool Whole>
  void write(int64_t at, int64_t n, const vf* x, const vu* noise) const {
    for (int i = 0; i < kMomentVectors; ++i) {
      // a pattern without low bits: the store rounds no more
      const vf rounded = M == Moments::fp32 ? x[i] : O::from_bits(math::stochastic_bf16<vf>(x[i], noise[i]) << 16);
      put<Whole>(data + at, i, n, rounded);
    }
  }
};

template <bool Signed>
struct Moment<Moments::int8, Signed> {
  float* scales;
  uint8_t* codes;
  Moment(void* p, int64_t numel)
      : scales(static_cast<float*>(p)), codes(static_cast<uint8_t*>(p) + math::moment_scale_bytes(numel)) {}

  template <bool Whole>
  void read(int64_t at, int64_t n, vf* x) const {
    uint8_t bytes[math::kMomentBlock] = {};
    memcpy(bytes, codes + at, static_cast<size_t>(Whole ? math::kMomentBlock : n));
    const float scale = scales[at / math::kMomentBlock];
    for (int i = 0; i < kMomentVectors; ++i) {
      x[i] = math::moment_value<Signed, vf>(load_bytes(bytes + i * kLanes)) * scale;
    }
  }
  template <bool Whole>
  void write(int64_t at, int64_t n, const vf* x, const vu* noise) const {
    uint8_t bytes[math::kMomentBlock] = {};
    vf block[kMomentVectors];
    for (int i = 0; i < kMomentVectors; ++i) block[i] = Whole || n > i * kLanes ? x[i] : vf{};
    const float scale = math::moment_scale(block_absmax(block));
    for (int i = 0; i < kMomentVectors && scale > 0.0f; ++i) {
      store_bytes(bytes + i * kLanes, math::moment_code<Signed, vf>(block[i], O::splat(scale), noise[i]));
    }
    scales[at / math::kMomentBlock] = scale;
    memcpy(codes + at, bytes, static_cast<size_t>(Whole ? math::kMomentBlock : n));
  }
};

// n values from `at`, a multiple of kMomentBlock. T is the 16-bit copy's type; a null copy is not written.
template <bool Whole, Moments M, class T>
SPU_INLINE void adamw_block(const cpu::AdamWRange& r, const math::AdamWStep& k, int64_t at, int64_t n) {
  const Moment<M, true> first(r.exp_avg, r.numel);
  const Moment<M, false> second(r.exp_avg_sq, r.numel);
  vf m[kMomentVectors], v[kMomentVectors];
  vu low[kMomentVectors], high[kMomentVectors];
  first.template read<Whole>(at, n, m);
  second.template read<Whole>(at, n, v);
  for (int i = 0; i < kMomentVectors; ++i) {
    const vf g = take<Whole>(r.grad + at, i, n) * r.grad_scale;
    vf master = take<Whole>(r.master + at, i, n);
    T* const param = static_cast<T*>(r.param);
    if (param) master = math::following<vf>(master, rounded_to<T>(master), take<Whole>(param + at, i, n));
    const math::AdamWState<vf> s = math::adamw_step<vf>({master, m[i], v[i]}, g, k);
    put<Whole>(r.master + at, i, n, s.param);
    if (param) put<Whole>(param + at, i, n, s.param);
    m[i] = s.m;
    v[i] = s.v;
    const vu number = lane_numbers(typename MakeLanes<kLanes>::type{}) + static_cast<uint32_t>(at + i * kLanes);
    const vu noise = M == Moments::fp32 ? vu{} : math::moment_noise<vu>(number, r.seed);
    low[i] = noise & 0xffffu;
    high[i] = noise >> 16;
  }
  first.template write<Whole>(at, n, m, low);
  second.template write<Whole>(at, n, v, high);
}

template <Moments M, class T>
static void adamw_blocks(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  const math::AdamWStep k = step;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * math::kMomentBlock, n = r.numel - at;
    if (n >= math::kMomentBlock) {
      adamw_block<true, M, T>(r, k, at, math::kMomentBlock);
    } else {
      adamw_block<false, M, T>(r, k, at, n);
    }
  }
}

template <class T>
static void adamw_of_copy(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (r.moments == Moments::fp32) return adamw_blocks<Moments::fp32, T>(r, step, begin, end);
  if (r.moments == Moments::bf16) return adamw_blocks<Moments::bf16, T>(r, step, begin, end);
  return adamw_blocks<Moments::int8, T>(r, step, begin, end);
}

static void adamw(const cpu::AdamWRange& r, const math::AdamWStep& step, int64_t begin, int64_t end) {
  if (r.param_type == Type::fp16) return adamw_of_copy<Fp16>(r, step, begin, end);
  return adamw_of_copy<Bf16>(r, step, begin, end);
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
