// The tensor-core kernels: one function for each architecture, form, type and tile, gemm_sm<arch>_<form>_<type>_<tile>,
// in an object for each architecture and form (gemm_mma.cu, gemm_wgmma.cu). True if the product was launched.
#pragma once

#include "cuda/gemm.h"

#define SPU_JOIN_(arch, form, type, tile) gemm_sm##arch##_##form##_##type##_##tile
#define SPU_JOIN(arch, form, type, tile) SPU_JOIN_(arch, form, type, tile)

// A block's threads and bytes of dynamic shared memory as the sizes of symbols: benchmarks/aot/aot_cuda.py reads them,
// since ptxas knows neither.
#ifdef SPU_REPORT
#define SPU_REPORT_BLOCK(type, tile)                                                                 \
  extern "C" char spu_block_threads_##type##_##tile[Product<Type::type, Tile::tile>::kBlockThreads]; \
  extern "C" char spu_block_shared_##type##_##tile[Product<Type::type, Tile::tile>::kBlockShared];   \
  char spu_block_threads_##type##_##tile[Product<Type::type, Tile::tile>::kBlockThreads];            \
  char spu_block_shared_##type##_##tile[Product<Type::type, Tile::tile>::kBlockShared];
#else
#define SPU_REPORT_BLOCK(type, tile)
#endif

// Defines the function of one product of the including file, which calls it Product<Type, Tile>.
#define SPU_PRODUCT(type, tile)                                                                            \
  bool SPU_JOIN(SPU_ARCH, SPU_FORM, type, tile)(const Gemm& g, int multiprocessors, cudaStream_t stream) { \
    return Product<Type::type, Tile::tile>::launch(g, multiprocessors, stream);                            \
  }                                                                                                        \
  SPU_REPORT_BLOCK(type, tile)

namespace spu::cuda {

using TensorCoreGemm = bool (*)(const Gemm& g, int multiprocessors, cudaStream_t stream);

#define SPU_DECLARE(arch, type)                                                \
  bool gemm_sm##arch##_forward_##type##_large(const Gemm&, int, cudaStream_t); \
  bool gemm_sm##arch##_forward_##type##_small(const Gemm&, int, cudaStream_t); \
  bool gemm_sm##arch##_dx_##type##_large(const Gemm&, int, cudaStream_t);      \
  bool gemm_sm##arch##_dx_##type##_small(const Gemm&, int, cudaStream_t);      \
  bool gemm_sm##arch##_dw_##type##_large(const Gemm&, int, cudaStream_t)

SPU_DECLARE(75, fp16);
SPU_DECLARE(80, fp16);
SPU_DECLARE(80, bf16);
SPU_DECLARE(90, fp16);
SPU_DECLARE(90, bf16);
#undef SPU_DECLARE

}  // namespace spu::cuda
