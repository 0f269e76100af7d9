// What a step of AdamW reads and writes of a block, in each form that it is kept in: moments, masters, corrections.
// Included in the namespace of an instruction set.
#pragma once

#include "cpu/codec_kernels.h"
#include "cpu/kernels.h"
#include "cpu/vec_codes.h"
#include "math/masters.h"
#include "math/moments.h"

namespace spu::SPU_ISA_NS {

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

// Blocks that go together through the passes below, their values between two passes in the first-level cache. A pass
// does one thing to all of them: a chain of instructions, such as that from a block's values to its scale, does not
// hold up other blocks, and the constants of one pass fit the registers. The usual case runs without the selections of
// the others, notices by one test a block that it was not met, and then the block is done again.
constexpr int kChunkBlocks = 8, kChunkVectors = kChunkBlocks * kMomentVectors;

// Asks for the cache line that vector i of the next chunk begins, if it begins one: the processor's own prefetching
// knows nothing of the next page, and a step has seven streams of them.
template <class P>
SPU_INLINE void fetch(const P* p, int i) {
  constexpr int vectors = static_cast<int>(64 / (sizeof(P) * kLanes));
  if (vectors < 2 || i % vectors == 0) __builtin_prefetch(p + (kChunkVectors + i) * kLanes, 1);
}

// One moment, from a block on.
template <Moments M, bool Signed>
struct Moment {
  static constexpr bool staged = false;
  using T = typename Pick<M == Moments::fp32, float, Bf16>::type;
  T* data;
  Moment(void* p, int64_t, int64_t at) : data(static_cast<T*>(p) + at) {}
  void shift(Tail& tail) { tail.take(data); }

  void ahead(int i) const { fetch(data, i); }
  vf read(int i) const { return load(data + i * kLanes); }
  // noise: 32 bits for both moments.
  void write(int i, vf x, vu noise) const {
    // a pattern without low bits: the store rounds no more
    const vu bits = Signed ? noise & 0xffffu : noise >> 16;
    store(data + i * kLanes, M == Moments::fp32 ? x : O::from_bits(math::stochastic_bf16<vf>(x, bits) << 16));
  }
};

template <bool Signed>
struct Moment<Moments::int8, Signed> {
  static constexpr bool staged = true;
  float* scales;
  uint8_t* codes;
  Moment(void* p, int64_t numel, int64_t at)
      : scales(static_cast<float*>(p) + at / math::kMomentBlock),
        codes(static_cast<uint8_t*>(p) + math::moment_scale_bytes(numel) + at) {}
  void shift(Tail& tail) { tail.take(codes); }
  void ahead(int i) const { fetch(codes, i); }

  void read_all(int blocks, vf* x) const {
    for (int b = 0; b < blocks; ++b, x += kMomentVectors) {
      const uint8_t* from = codes + b * math::kMomentBlock;
      if (!Signed && infinite(scales[b])) {  // also where a tail has no codes: 0 * infinity would be NaN
        for (int i = 0; i < kMomentVectors; ++i) x[i] = O::splat(scales[b]);
      } else if (any_byte_without(Signed ? 0x7f : 0xff, from)) {
        read_block<true>(from, O::splat(scales[b]), x);
      } else {
        read_block<false>(from, O::splat(scales[b]), x);
      }
    }
  }
  void write_all(int blocks, const vf* x, const vu* noise) const {
    for (int b = 0; b < blocks; ++b) {
      vu top = {};
#pragma GCC unroll 16
      for (int i = b * kMomentVectors; i < (b + 1) * kMomentVectors; ++i) {
        top =
            max_u(top, Signed ? O::bits(x[i]) & 0x7fffffffu : O::bits(x[i]));  // as block_absmax; squares have no sign
      }
      scales[b] = math::moment_scale<Signed>(math::Ops<float>::from_bits(max_lane(top)));
    }
    for (int b = 0; b < blocks; ++b, x += kMomentVectors, noise += kMomentVectors) {
      const float scale = scales[b];
      uint8_t* to = codes + b * math::kMomentBlock;
      if (!(scale > 0.0f)) {
        memset(to, 0, math::kMomentBlock);
      } else if (!Signed && infinite(scale)) {
        memset(to, math::MomentCode<false>::kMost, math::kMomentBlock);
      } else if (!(SPU_EXACT_FMA && scale >= kLeastExactScale && write_block<true>(to, scale, x, noise))) {
        write_block<false>(to, scale, x, noise);
      }
    }
  }

 private:
  static bool infinite(float scale) { return math::Ops<float>::bits(scale) == 0x7f800000u; }
  template <bool Zeros>
  static void read_block(const uint8_t* from, vf scale, vf* x) {
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) {
      x[i] = math::moment_value<Signed, vf, Zeros>(load_bytes(from + i * kLanes)) * scale;
    }
  }
  // False if the usual case was not met.
  template <bool Usual>
  static bool write_block(uint8_t* to, float scale, const vf* x, const vu* noise) {
    const vf s = O::splat(scale), inv = O::splat(1.0f / scale);
    vu made[kMomentVectors], low = vu{} + math::MomentCode<Signed>::kSmallest;
#pragma GCC unroll 16
    for (int i = 0; i < kMomentVectors; ++i) {
      const vf size = Signed ? math::abs(x[i]) : x[i];
      const vu bits = Signed ? noise[i] & 0xffffu : noise[i] >> 16;
      vu code;
      if (Usual) {
        const vf q = size * inv, units = O::fma(O::fma(-q, s, size), inv, q);  // `quotient`, of magnitudes
        if (Signed) low = min_u(low, O::bits(units));
        code = math::moment_size_of_large<Signed, vf>(units, bits);
      } else {
        code = math::moment_size<Signed, vf>(size / s, bits);
      }
      made[i] = Signed ? code | ((O::bits(x[i]) >> 24) & 0x80u) : code;
    }
    if (Usual && Signed && any_from(~low, ~math::MomentCode<Signed>::kSmallest + 1)) return false;
    store_64_bytes(to, made);
    return true;
  }
};

// The fp32 value that is updated, from a block on: an fp32 parameter, a master, or a 16-bit weight with a correction.
struct OwnValue {
  static constexpr bool staged = false, rounds = false;
  float* value;
  OwnValue(const cpu::AdamWRange& r, int64_t at) : value(static_cast<float*>(r.master) + at) {}
  void shift(Tail& tail) { tail.take(value); }
  void ahead(int i) const { fetch(value, i); }
  vf read(int i) const { return load(value + i * kLanes); }
  void write(int i, vf x) const { store(value + i * kLanes, x); }
};

template <class T>
struct WithMaster {
  static constexpr bool staged = false, rounds = false;
  T* weight;
  float* master;
  WithMaster(const cpu::AdamWRange& r, int64_t at)
      : weight(static_cast<T*>(r.param) + at), master(static_cast<float*>(r.master) + at) {}
  void shift(Tail& tail) {
    tail.take(weight);
    tail.take(master);
  }
  void ahead(int i) const {
    fetch(weight, i);
    fetch(master, i);
  }
  vf read(int i) const {
    const vf value = load(master + i * kLanes);
    return math::following<vf>(value, rounded_to<T>(value), load(weight + i * kLanes));
  }
  void write(int i, vf x) const {
    store(master + i * kLanes, x);
    store(weight + i * kLanes, x);
  }
};

template <class T, Master K>
struct WithCorrection {
  static constexpr bool staged = true, rounds = K == Master::bits8;
  static constexpr int bits = rounds ? 8 : 16;
  using C = typename Pick<rounds, int8_t, int16_t>::type;
  T* weight;
  C* correction;
  WithCorrection(const cpu::AdamWRange& r, int64_t at)
      : weight(static_cast<T*>(r.param) + at), correction(static_cast<C*>(r.master) + at) {}
  void shift(Tail& tail) {
    tail.take(weight);
    tail.take(correction);
  }
  void ahead(int i) const {
    fetch(weight, i);
    fetch(correction, i);
  }

  void read_all(int blocks, vf* x) const {
    for (int b = 0; b < blocks; ++b) {
      if (!T::is_fp16 || !read_usual(b * kMomentVectors, x)) read_block(b * kMomentVectors, x);
    }
  }
  void write_all(int blocks, const vf* x, const vu* noise) const {
    for (int b = 0; b < blocks; ++b) {
      const int from = b * kMomentVectors;
      if (write_usual(from, x, noise)) continue;
#pragma GCC unroll 16
      for (int i = from; i < from + kMomentVectors; ++i) {
        const math::Corrected<vf> s = math::split<T::is_fp16, bits, vf>(x[i], noise_of(noise, i));
        store_words(weight + i * kLanes, s.weight);
        put(i, s.correction);
      }
    }
  }

 private:
  static vu noise_of(const vu* noise, int i) { return rounds ? math::master_noise(noise[i]) : vu{}; }
  vi rest(int i) const {
    if constexpr (rounds) {
      return load_codes(correction + i * kLanes);
    } else {
      return load_words(correction + i * kLanes);
    }
  }
  void put(int i, vi rest) const {
    if constexpr (rounds) {
      store_bytes(reinterpret_cast<uint8_t*>(correction) + i * kLanes, (vu)rest & 0xffu);
    } else {
      store_words(correction + i * kLanes, (vu)rest);
    }
  }
  void read_block(int from, vf* x) const {
#pragma GCC unroll 16
    for (int i = from; i < from + kMomentVectors; ++i) {
      const vu pattern = load_words(reinterpret_cast<const uint16_t*>(weight) + i * kLanes);
      x[i] = math::joined<T::is_fp16, bits, vf>(pattern, rest(i));
    }
  }
  bool read_usual(int from, vf* x) const {
    vu top = {};
#pragma GCC unroll 16
    for (int i = from; i < from + kMomentVectors; ++i) {
      const vf w = load(weight + i * kLanes);
      top = max_u(top, (O::bits(w) & 0x7fffffffu) - math::kUsualWeight);
      x[i] = math::joined_usual_fp16<bits, vf>(w, rest(i));
    }
    return !any_from(top, math::kUsualWeightEnd - math::kUsualWeight);
  }
  bool write_usual(int from, const vf* x, const vu* noise) const {
    constexpr uint32_t first = T::is_fp16 ? math::kUsualLeast : 0u;
    constexpr uint32_t end = T::is_fp16 ? math::kUsualEnd : math::kUsualEndBf16;
    vu top = {};
    vi tie = vi{} - 1;
#pragma GCC unroll 16
    for (int i = from; i < from + kMomentVectors; ++i) {
      const vu u = O::bits(x[i]);
      top = max_u(top, (u & 0x7fffffffu) - first);
      const math::Corrected<vf> s = math::split_usual<T::is_fp16, bits, vf>(x[i], noise_of(noise, i));
      if constexpr (T::is_fp16 && !rounds) {
        const vi low = (vi)(u << 19);  // the 13 bits that fp16 lacks; a tie is the least integer
        tie = low < tie ? low : tie;
        store(weight + i * kLanes, x[i]);
      } else {
        store_words(weight + i * kLanes, s.weight);
      }
      put(i, s.correction);
    }
    return !any_from(top, end - first) && !any_from((vu)~tie, 0x7fffffffu);
  }
};

}  // namespace spu::SPU_ISA_NS
