// Wires: a thread codes eight values, the threads of a block of values find its scale by exchanging maxima.
#include "cuda/codec.h"

#include "cuda/codes.h"
#include "math/codec.h"

namespace spu::cuda {
namespace {

using wire::Codec;

// The codes of eight values: 16, 8 or 4 bytes.
template <Codec C>
struct Format;

template <>
struct Format<Codec::int8> {
  static constexpr int kBits = 8, kBlock = math::kInt8Block;
  static constexpr float kLargest = 127.0f;
  SPU_DEVICE uint32_t code(float x, float scale) {
    return static_cast<uint32_t>(static_cast<int>(math::int8_code<float>(x, scale))) & 0xffu;
  }
  SPU_DEVICE float value(uint32_t code) { return static_cast<float>(static_cast<int>(code ^ 0x80u) - 128); }
};

template <>
struct Format<Codec::int4> {
  static constexpr int kBits = 4, kBlock = math::kInt4Block;
  static constexpr float kLargest = math::kInt4Largest;
  SPU_DEVICE uint32_t code(float x, float scale) {
    return static_cast<uint32_t>(static_cast<int>(math::int4_code<float>(x, scale))) & 0xfu;
  }
  SPU_DEVICE float value(uint32_t code) { return static_cast<float>(static_cast<int>(code ^ 0x8u) - 8); }
};

template <int Mantissa, int Bias>
struct Fp8 {
  static constexpr int kBits = 8, kBlock = math::kFp8Block;
  static constexpr float kLargest = Mantissa == 3 ? math::kE4m3Largest : math::kE5m2Largest;
  SPU_DEVICE uint32_t code(float x, float scale) {
    return math::fp8_code<Mantissa, Bias, float>(x, scale, kLargest) & 0xffu;
  }
  SPU_DEVICE float value(uint32_t code) { return math::fp8_value<Mantissa, Bias, float>(code); }
};
template <>
struct Format<Codec::fp8_e4m3> : Fp8<3, 7> {};
template <>
struct Format<Codec::fp8_e5m2> : Fp8<2, 15> {};

// The places of a wire's sections, and the rest that a pack kernel writes.
struct Wire {
  uint8_t* bytes;
  int64_t numel, scales, payload, payload_end, end;
};

Wire wire_of(Codec codec, uint8_t* bytes, int64_t numel) {
  Wire w = {bytes, numel, static_cast<int64_t>(sizeof(wire::Header)), 0, 0, 0};
  w.payload = w.scales + wire::scale_bytes(numel, codec);
  w.payload_end = w.payload + wire::payload_bytes(numel, codec);
  w.end = wire::wire_bytes(numel, codec);
  return w;
}

// The first block writes the header and the padding: at most 64 bytes each, one a thread. (The header must be a
// __grid_constant__ parameter: reading one byte of another would copy it to local memory first.)
SPU_DEVICE void write_frame(const Wire& w, const wire::Header& header, int64_t scales_end) {
  if (blockIdx.x != 0) return;
  const int t = static_cast<int>(threadIdx.x);
  if (t < static_cast<int>(sizeof header)) w.bytes[t] = reinterpret_cast<const uint8_t*>(&header)[t];
  if (scales_end + t < w.payload) w.bytes[scales_end + t] = 0;
  if (w.payload_end + t < w.end) w.bytes[w.payload_end + t] = 0;
}

template <Type From, Type To>
__global__ void __launch_bounds__(kThreads)
    pack_plain_kernel(const void* x, const __grid_constant__ wire::Header header, Wire w, bool wide) {
  write_frame(w, header, w.scales);
  void* payload = w.bytes + w.payload;
  for (int64_t i = first_value(); i < w.numel; i += grid_values()) {
    store<To>(payload, i, w.numel, wide, load<From>(x, i, w.numel, wide));
  }
}

template <Type From, Type To>
__global__ void __launch_bounds__(kThreads) unpack_plain_kernel(Wire w, void* x, bool wide) {
  const void* payload = w.bytes + w.payload;
  for (int64_t i = first_value(); i < w.numel; i += grid_values()) {
    store<To>(x, i, w.numel, wide, load<From>(payload, i, w.numel, wide));
  }
}

SPU_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

// The largest magnitude is taken over bit patterns: as unsigned integers they order like the magnitudes, with infinity
// and then NaN on top, so that no comparison loses a NaN. All threads run the loop equally often, for the shuffles.
template <Codec C, Type T>
__global__ void __launch_bounds__(kThreads)
    pack_blocks_kernel(const void* x, const __grid_constant__ wire::Header header, Wire w, bool wide) {
  using F = Format<C>;
  constexpr int kLanes = F::kBlock / kVector;
  const int64_t blocks = (w.numel + F::kBlock - 1) / F::kBlock;
  write_frame(w, header, w.scales + 4 * blocks);
  float* scales = reinterpret_cast<float*>(w.bytes + w.scales);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * kVector; base < w.numel; base += grid_values()) {
    const int64_t i = base + static_cast<int64_t>(threadIdx.x) * kVector;
    const Values v = load<T>(x, i, w.numel, wide);
    uint32_t top = 0;
    for (int j = 0; j < kVector; ++j) top = larger(top, math::Ops<float>::bits(v.v[j]) & 0x7fffffffu);
    for (int lane = 1; lane < kLanes; lane *= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, lane));
    if (i >= w.numel) continue;
    const float scale = math::block_scale(math::Ops<float>::from_bits(top), F::kLargest);
    if (threadIdx.x % kLanes == 0) scales[i / F::kBlock] = scale;
    uint32_t codes[kVector] = {};
    if (math::int8_scale_codes(scale)) {
      for (int j = 0; j < kVector; ++j) codes[j] = F::code(v.v[j], scale);
    }
    store_codes<F::kBits>(w.bytes + w.payload, i, w.numel, wide, codes);
  }
}

template <Codec C, Type T>
__global__ void __launch_bounds__(kThreads) unpack_blocks_kernel(Wire w, void* x, bool wide) {
  using F = Format<C>;
  const float* scales = reinterpret_cast<const float*>(w.bytes + w.scales);
  for (int64_t i = first_value(); i < w.numel; i += grid_values()) {
    uint32_t codes[kVector];
    load_codes<F::kBits>(w.bytes + w.payload, i, w.numel, wide, codes);
    const float scale = scales[i / F::kBlock];
    Values v;
    for (int j = 0; j < kVector; ++j) v.v[j] = F::value(codes[j]) * scale;
    store<T>(x, i, w.numel, wide, v);
  }
}

template <Codec C>
struct CodecTag {
  static constexpr Codec value = C;
};

// Calls f with a block-wise codec as a constant.
template <class F>
void with_blocks(Codec codec, F f) {
  if (codec == Codec::int8) return f(CodecTag<Codec::int8>{});
  if (codec == Codec::int4) return f(CodecTag<Codec::int4>{});
  if (codec == Codec::fp8_e4m3) return f(CodecTag<Codec::fp8_e4m3>{});
  return f(CodecTag<Codec::fp8_e5m2>{});
}

}  // namespace

void launch_pack(Codec codec, Type type, const void* x, const wire::Header& header, uint8_t* bytes,
                 cudaStream_t stream) {
  const Wire w = wire_of(codec, bytes, header.numel);
  const bool wide = aligned16(x) && aligned16(bytes);
  with_type(type, [&](auto t) {
    constexpr Type T = decltype(t)::value;
    if (wire::is_plain(codec)) {
      launch(codec == Codec::fp16 ? pack_plain_kernel<T, Type::fp16> : pack_plain_kernel<T, Type::bf16>,
             grid_for(w.numel), kThreads, stream, x, header, w, wide);
    } else {
      with_blocks(codec, [&](auto c) {
        launch(pack_blocks_kernel<decltype(c)::value, T>, grid_for(w.numel), kThreads, stream, x, header, w, wide);
      });
    }
  });
}

void launch_unpack(Codec codec, Type type, const uint8_t* bytes, void* x, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return;
  const Wire w = wire_of(codec, const_cast<uint8_t*>(bytes), numel);  // the kernels only read it
  const bool wide = aligned16(x) && aligned16(bytes);
  with_type(type, [&](auto t) {
    constexpr Type T = decltype(t)::value;
    if (wire::is_plain(codec)) {
      launch(codec == Codec::fp16 ? unpack_plain_kernel<Type::fp16, T> : unpack_plain_kernel<Type::bf16, T>,
             grid_for(numel), kThreads, stream, w, x, wide);
    } else {
      with_blocks(codec, [&](auto c) {
        launch(unpack_blocks_kernel<decltype(c)::value, T>, grid_for(numel), kThreads, stream, w, x, wide);
      });
    }
  });
}

}  // namespace spu::cuda
