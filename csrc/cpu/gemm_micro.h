// The register-blocked micro-kernel. Included in the namespace of an instruction set, which defines SPU_MR and SPU_NV
// (the micro-tile: rows, vectors).
//
// AVX2: 6 x 16 keeps 12 accumulators, two B vectors and a broadcast in 16 registers; 12 multiply-adds hide two units'
// latency of 4 cycles and wait for 8 loads, which two load ports deliver in 4 of their 6 cycles. AVX-512: 14 x 32, 28
// accumulators of 32 registers, 16 loads beside 14 cycles of multiply-adds.
//
// A core whose other hyperthread is busy issues half as many instructions to each, three a cycle where it has six, and
// then instructions are scarce, not multiply-adds: 51 for 14 cycles of them were 17 cycles. So k goes in steps of two
// or four (AVX2), and AVX-512 takes 8 of 14 values of A from memory within the multiply-add, which saves a broadcast of
// three instructions and costs a load: 26 loads, and two load ports deliver 28. (All 14 would wait for them.)
//
// Panels that have left L1 (32 KB on Cascade Lake) come from L2, so AVX-512 asks for B ahead: 15% of the time of large
// products there. A, of which a line serves all panels of B, comes by itself.
#pragma once

#include <utility>

#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

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

// Slots that a panel of B is asked for ahead of its use.
constexpr int kAheadB = 8;

// Of a micro-tile's rows, those whose value of A each multiply-add reads from memory, evenly among the others.
constexpr int kFromMemory = kLanes == 16 ? 8 : 0;
template <bool Pairs>
constexpr bool from_memory(int row) {
  return !Pairs && (row + 1) * kFromMemory / kMR != row * kFromMemory / kMR;
}

// acc [Rows, kNV] += a b for one slot: rows of A `stride` apart, one row of B.
template <bool Pairs, int Rows>
SPU_INLINE void multiply_slot(const float* a, int64_t stride, const float* b, vf (&acc)[Rows][kNV]) {
  vf bv[kNV];
#pragma GCC unroll 4
  for (int j = 0; j < kNV; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const float* p = a + i * stride;
    if (from_memory<Pairs>(i)) {
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) acc[i][j] = fma_at(p, bv[j], acc[i][j]);
    } else {
      const vf av = splat_slot<Pairs>(p);
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) acc[i][j] = multiply_add<Pairs>(av, bv[j], acc[i][j]);
    }
  }
}

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
  constexpr int kSteps = kLanes == 16 ? 2 : 4;
  int64_t k = 0;
  for (; k + kSteps <= slots; k += kSteps, a += kSteps * kMR, b += kSteps * kNR) {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      multiply_slot<Pairs, Rows>(a + step * kMR, 1, b + step * kNR, acc);
      if constexpr (kLanes == 16) {
#pragma GCC unroll 4
        for (int j = 0; j < kNV; ++j) __builtin_prefetch(b + (kAheadB + step) * kNR + j * kLanes);
      }
    }
  }
  for (; k < slots; ++k, a += kMR, b += kNR) multiply_slot<Pairs, Rows>(a, 1, b, acc);
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

}  // namespace spu::SPU_ISA_NS
