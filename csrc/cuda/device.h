// The CUDA runtime and a kernel launch; in a host simulation (SPU_HOST_SIM, tests/cuda_host) a stand-in that runs the
// same kernels on the CPU, one fiber for each CUDA thread.
#pragma once

#ifdef SPU_HOST_SIM
#include "host_sim.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

namespace spu::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("spu: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

#if defined(SPU_HOST_SIM)
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, cudaStream_t, A... arguments) {
  host_sim::run(kernel, blocks, threads, static_cast<P>(arguments)...);
}
#elif defined(__CUDACC__)
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, cudaStream_t stream, A... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), "a kernel launch");
}
#endif

}  // namespace spu::cuda
