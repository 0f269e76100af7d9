// The kernels for any CPU: 16-byte vectors, which every 64-bit x86 and Arm has.
#define SPU_ISA_NS isa_generic
#define SPU_ISA_NAME "scalar"
#define SPU_LANES 4
#define SPU_MR 4
#define SPU_NV 2
#include "cpu/kernels_impl.h"

namespace spu::cpu {
const KernelTable& generic_kernels() {
  return isa_generic::kTable;
}
}  // namespace spu::cpu
