// Matrix products by cuBLASLt, with what it can do of our epilogues; the rest by passes over the result.
#pragma once

#include "cuda/gemm.h"

namespace spu::cuda {

// Launches the product on the stream; false, with nothing launched, if there is no cuBLASLt or it takes no such
// product: fp32 operands, rows that do not start at multiples of 16 bytes, a shape it has no algorithm for.
// algorithm: which of those that it proposes, the best first; the last one where there are fewer.
bool launch_gemm_library(const Gemm& g, cudaStream_t stream, Scratch& scratch, int algorithm = 0);

// Algorithms are looked for once for each product's shape, layout and epilogue on a device, and kept: how many are.
size_t library_plans();

}  // namespace spu::cuda
