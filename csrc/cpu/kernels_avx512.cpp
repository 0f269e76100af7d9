// The kernels for AVX-512 (F, BW, VL, DQ): 14 x 32 micro-tile, 28 of the 32 registers are accumulators.
// SPU_EMULATE_AVX512 builds the same code without the instructions, for tests on other machines.
#define SPU_ISA_NS isa_avx512
#define SPU_ISA_NAME "avx512"
#define SPU_LANES 16
#define SPU_MR 14
#define SPU_NV 2
#if !defined(SPU_EMULATE_AVX512)
#define SPU_VEC_AVX512
#endif
#include "cpu/kernels_impl.h"

namespace spu::cpu {
const KernelTable& avx512_kernels() {
  return isa_avx512::kTable;
}
}  // namespace spu::cpu
