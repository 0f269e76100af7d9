// The register-blocked micro-kernel. Included in the namespace of an instruction set, which defines SPU_MR and SPU_NV
// (the micro-tile: rows, vectors).
//
// AVX2: 6 x 16 keeps 12 accumulators, two B vectors and a broadcast in 16 registers; 12 multiply-adds hide two units'
// latency of 4 cycles and wait for 8 loads, which two load ports deliver in 4 of their 6 cycles. AVX-512: 14 x 32, 28
// accumulators of 32 registers, 16 loads beside 14 cycles of multiply-adds. These wait for L2 where the panels have
// left L1 (32 KB on Cascade Lake), so AVX-512 asks for them ahead: 15% of the time of large products there.
#pragma once

#include <utility>

#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

constexpr int kMR = SPU_MR, kNV = SPU_NV, kNR = SPU_NV * kLanes;

// A slot of k in a packed panel is 4 bytes: one fp32 value, or (Pairs) two bf16 values, the even k in the low half.
template <bool Pairs>
SPU_INLINE vf splat_slot(const float* a) {
  if constexpr (!Pairs) return O::splat(*a);
  uint32_t bits;  // never through floating arithmetic: a pair may look like a NaN
  memcpy(&bits, a, sizeof bits);
  return (vf)(vu{} + bits);
}

template <bool Pairs>
SPU_INLINE vf multiply_add(vf a, vf b, vf c) {
  if constexpr (Pairs) return dot_bf16(a, b, c);
  return O::fma(a, b, c);
}

// Slots that a panel is asked for ahead of its use: a line of A holds four or five.
constexpr int kAheadA = 16, kAheadB = 8;

// c [Rows, kNR] (+)= the first Rows of a panel (kMR x slots) times b panel (slots x kNR); `add` loads c first.
template <bool Pairs, int Rows = kMR>
__attribute__((noinline)) static void micro_kernel(int64_t slots, const float* a, const float* b, float* c, int64_t ldc,
                                                   bool add) {
  vf acc[Rows][kNV];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) acc[i][j] = vf{};
  }
  for (int64_t k = 0; k < slots; ++k) {
    vf bv[kNV];
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const vf av = splat_slot<Pairs>(a + i);
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) acc[i][j] = multiply_add<Pairs>(av, bv[j], acc[i][j]);
    }
    if constexpr (kLanes == 16) {
      __builtin_prefetch(a + kAheadA * kMR);
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) __builtin_prefetch(b + kAheadB * kNR + j * kLanes);
    }
    a += kMR;
    b += kNR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) {
      float* p = c + i * ldc + j * kLanes;
      store(p, add ? load(p) + acc[i][j] : acc[i][j]);
    }
  }
}

using MicroKernel = void (*)(int64_t slots, const float* a, const float* b, float* c, int64_t ldc, bool add);

template <bool Pairs, class Rows>
struct MicroKernels;
template <bool Pairs, int... Rows>
struct MicroKernels<Pairs, std::integer_sequence<int, Rows...>> {
  static constexpr MicroKernel of[] = {micro_kernel<Pairs, Rows + 1>...};
};

// By the rows of a panel that are used, less one.
template <bool Pairs>
constexpr const MicroKernel (&kMicroKernels)[kMR] = MicroKernels<Pairs, std::make_integer_sequence<int, kMR>>::of;

}  // namespace SPU_ISA_NS
}  // namespace spu
