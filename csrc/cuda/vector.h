// Eight values at a time: loads and stores of 16 bytes, widened to fp32 on the way in, rounded on the way out.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda/device.h"
#include "cuda/types.h"
#include "math/half.h"

namespace spu::cuda {

#define SPU_DEVICE static __device__ __forceinline__
#if defined(__CUDACC__)
#define SPU_UNROLL _Pragma("unroll")
#else
#define SPU_UNROLL
#endif

constexpr int kVector = 8;  // values a thread handles at once
constexpr int kThreads = 256;

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

struct Values {
  float v[kVector];
};

// The conversions of math/half.h; on a device by its own instructions, which round alike.
template <Type T>
SPU_DEVICE float widen(uint32_t h) {
  if (T == Type::bf16) return math::bf16_to_float<float>(h);
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(h)));
  return x;
#else
  return math::fp16_to_float<float>(h);
#endif
}

template <Type T>
SPU_DEVICE uint32_t narrow(float x) {
  if (T == Type::bf16) return math::float_to_bf16<float>(x);
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  return math::float_to_fp16<float>(x);
#endif
}

template <Type T>
SPU_DEVICE float load_one(const void* p, int64_t i) {
  if (T == Type::fp32) return static_cast<const float*>(p)[i];
  return widen<T>(static_cast<const uint16_t*>(p)[i]);
}

template <Type T>
SPU_DEVICE void store_one(void* p, int64_t i, float x) {
  if (T == Type::fp32) {
    static_cast<float*>(p)[i] = x;
  } else {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(narrow<T>(x));
  }
}

// p[i .. i + 8), whose address is a multiple of 16.
template <Type T>
SPU_DEVICE Values load_eight(const void* p, int64_t i) {
  Values out;
  if (T == Type::fp32) {
    const Bytes16* from = reinterpret_cast<const Bytes16*>(static_cast<const float*>(p) + i);
    const Bytes16 low = from[0], high = from[1];
    for (int j = 0; j < 4; ++j) {
      out.v[j] = math::Ops<float>::from_bits(low.word[j]);
      out.v[4 + j] = math::Ops<float>::from_bits(high.word[j]);
    }
  } else {
    const Bytes16 raw = *reinterpret_cast<const Bytes16*>(static_cast<const uint16_t*>(p) + i);
    for (int j = 0; j < 4; ++j) {
      out.v[2 * j] = widen<T>(raw.word[j] & 0xffffu);
      out.v[2 * j + 1] = widen<T>(raw.word[j] >> 16);
    }
  }
  return out;
}

template <Type T>
SPU_DEVICE void store_eight(void* p, int64_t i, const Values& x) {
  if (T == Type::fp32) {
    Bytes16 low, high;
    for (int j = 0; j < 4; ++j) {
      low.word[j] = math::Ops<float>::bits(x.v[j]);
      high.word[j] = math::Ops<float>::bits(x.v[4 + j]);
    }
    Bytes16* to = reinterpret_cast<Bytes16*>(static_cast<float*>(p) + i);
    to[0] = low;
    to[1] = high;
  } else {
    Bytes16 raw;
    for (int j = 0; j < 4; ++j) raw.word[j] = narrow<T>(x.v[2 * j]) | narrow<T>(x.v[2 * j + 1]) << 16;
    *reinterpret_cast<Bytes16*>(static_cast<uint16_t*>(p) + i) = raw;
  }
}

// Values i .. i + 8 of n; those past the end are 0. `wide` says that all arrays are 16-byte aligned.
template <Type T>
SPU_DEVICE Values load(const void* p, int64_t i, int64_t n, bool wide) {
  if (wide && i + kVector <= n) return load_eight<T>(p, i);
  Values out;
  for (int j = 0; j < kVector; ++j) out.v[j] = i + j < n ? load_one<T>(p, i + j) : 0.0f;
  return out;
}

template <Type T>
SPU_DEVICE void store(void* p, int64_t i, int64_t n, bool wide, const Values& x) {
  if (wide && i + kVector <= n) return store_eight<T>(p, i, x);
  for (int j = 0; j < kVector; ++j) {
    if (i + j < n) store_one<T>(p, i + j, x.v[j]);
  }
}

inline bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Blocks of kThreads threads, each with kVector values, for a loop over n values that strides over the grid: enough
// to fill any device several times over.
inline unsigned grid_for(int64_t n) {
  const int64_t blocks = (n + kThreads * kVector - 1) / (kThreads * kVector);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 8192 ? 8192 : blocks);
}

// The first value of this thread, and the distance to its next ones.
SPU_DEVICE int64_t first_value() {
  return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
}
SPU_DEVICE int64_t grid_values() {
  return static_cast<int64_t>(gridDim.x) * kThreads * kVector;
}

// found_inf := 1. Every writer stores the same value.
SPU_DEVICE void raise_flag(float* found_inf) {
  *static_cast<volatile float*>(found_inf) = 1.0f;
}

// A storage type as a value that a generic lambda can take a constant from.
template <Type T>
struct TypeTag {
  static constexpr Type value = T;
};

template <class F>
void with_type(Type type, F f) {
  if (type == Type::fp16) return f(TypeTag<Type::fp16>{});
  if (type == Type::bf16) return f(TypeTag<Type::bf16>{});
  return f(TypeTag<Type::fp32>{});
}

}  // namespace spu::cuda
