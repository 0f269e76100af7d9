// The kernels for AVX2 + FMA + F16C: 6 x 16 micro-tile, 12 of the 16 registers are accumulators.
#define SPU_ISA_NS isa_avx2
#define SPU_ISA_NAME "avx2"
#define SPU_LANES 8
#define SPU_MR 6
#define SPU_NV 2
#define SPU_VEC_AVX2
#include "cpu/kernels_impl.h"

namespace spu::cpu {
const KernelTable& avx2_kernels() {
  return isa_avx2::kTable;
}
}  // namespace spu::cpu
