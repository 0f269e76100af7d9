// The AVX-512 kernels for CPUs with AVX512_BF16: bf16 products by vdpbf16ps, two multiply-adds a lane and instruction.
// Panels hold pairs of bf16 values; everything else is as in kernels_avx512.cpp.
#define SPU_ISA_NS isa_avx512bf16
#define SPU_ISA_NAME "avx512bf16"
#define SPU_LANES 16
#define SPU_MR 14
#define SPU_NV 2
#define SPU_BF16_DOT
#if !defined(SPU_EMULATE_AVX512)
#define SPU_VEC_AVX512
#endif
#include "cpu/kernels_impl.h"

namespace spu::cpu {
const KernelTable& avx512bf16_kernels() {
  return isa_avx512bf16::kTable;
}
}  // namespace spu::cpu
