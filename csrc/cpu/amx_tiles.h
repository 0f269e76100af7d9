// The tile instructions of AMX-BF16 that the kernels use. Included in the namespace of an instruction set.
//
// A tile is 16 rows of 64 bytes; a thread has eight. tile_dot multiplies 16 x 32 bf16 values by 32 x 16: the right
// operand's row r holds the values at two places along k, side by side for each column, the left operand's dword r the
// same two places. Which two is free, as long as both sides agree.
#pragma once

#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileValues = kTileRows * kTileDepth;

// All eight tiles whole. What the processor reads: palette, row to restart from, bytes a row, rows.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace spu::SPU_ISA_NS

#if defined(SPU_EMULATE_AVX512)
#include "cpu/amx_emulated.h"
#else

// Seven instructions that do nothing follow each tile instruction. Beside a busy hyperthread of the same core tile
// instructions issued together wait for each other, and a step of four loads and four products took 180 cycles with
// them where it took 300 without; on an undisturbed core 69 with and without.
#define SPU_TILE_GAP "\n\t.rept 7\n\tnop\n\t.endr"

namespace spu::SPU_ISA_NS {

// Assembly, because the compilers' intrinsics do not say that they read memory, and take tile numbers by macro.
template <int T>
SPU_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" SPU_TILE_GAP : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// The same with the hint that these lines need not stay in L1.
template <int T>
SPU_INLINE void tile_stream(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" SPU_TILE_GAP : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
SPU_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
SPU_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int C, int A, int B>
SPU_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" SPU_TILE_GAP : : "i"(C), "i"(A), "i"(B));
}

// The calling thread's tiles, from here to the end of the scope. Held no longer than needed: a thread with tiles has 8
// KB more to save whenever it is switched.
struct Tiles {
  Tiles() {
    static constexpr TileShapes shapes = {};
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }
};

}  // namespace spu::SPU_ISA_NS
#endif
