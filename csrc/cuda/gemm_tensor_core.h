// The tensor-core kernels: one function for each architecture, form and type, each compiled in an object of its own
// (gemm_mma.cu and gemm_wgmma.cu) under the name gemm_sm<arch>_<form>_<type>. True if the product was launched.
#pragma once

#include "cuda/gemm.h"

#define SPU_JOIN_(arch, form, type) gemm_sm##arch##_##form##_##type
#define SPU_JOIN(arch, form, type) SPU_JOIN_(arch, form, type)
#define SPU_GEMM_NAME SPU_JOIN(SPU_ARCH, SPU_FORM, SPU_TYPE)

namespace spu {
namespace cuda {

using TensorCoreGemm = bool (*)(const Gemm& g, int multiprocessors, cudaStream_t stream);

#define SPU_DECLARE(arch, type)                                        \
  bool gemm_sm##arch##_forward_##type(const Gemm&, int, cudaStream_t); \
  bool gemm_sm##arch##_dx_##type(const Gemm&, int, cudaStream_t);      \
  bool gemm_sm##arch##_dw_##type(const Gemm&, int, cudaStream_t)

SPU_DECLARE(75, fp16);
SPU_DECLARE(80, fp16);
SPU_DECLARE(80, bf16);
SPU_DECLARE(90, fp16);
SPU_DECLARE(90, bf16);
#undef SPU_DECLARE

}  // namespace cuda
}  // namespace spu
