// The kernels for CPUs with AMX-BF16 (Sapphire Rapids and later): products of bf16 and fp16 on tiles, attention
// included; everything else is the AVX-512 kernels'. These serve small and fp32 products as well: `vdpbf16ps` runs at
// half of their rate on the first CPUs with tiles.
#define SPU_ISA_NS isa_amx
#define SPU_ISA_NAME "amx"
#define SPU_LANES 16
#define SPU_MR 14
#define SPU_NV 2
#if defined(SPU_EMULATE_AVX512)
#define SPU_AMX_BASE spu::cpu::avx512bf16_kernels  // the table that a test's build has
#else
#define SPU_VEC_AVX512
#define SPU_BF16_CONVERT  // every CPU with tiles has AVX512_BF16
#define SPU_AMX_BASE spu::cpu::avx512_kernels
#endif
#include "cpu/attention_amx.h"
#include "cpu/gemm_amx.h"

namespace spu::cpu {
namespace {

KernelTable with_tiles() {
  KernelTable table = SPU_AMX_BASE();
  table.gemm = isa_amx::gemm;
  table.attention = isa_amx::tile_attention;
  table.attention_backward = isa_amx::tile_attention_backward;
  table.name = SPU_ISA_NAME;
  return table;
}

}  // namespace

const KernelTable& amx_kernels() {
  static const KernelTable table = with_tiles();
  return table;
}
}  // namespace spu::cpu
