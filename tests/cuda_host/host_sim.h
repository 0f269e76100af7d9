// Runs CUDA kernels on the CPU, from their own sources: a fiber for each thread of a block, one block after another.
//
// A fiber runs until its next barrier or shuffle. Barriers release when every live thread of the block has arrived,
// shuffles when every live lane of the warp has; threads that wait for different things for ever are an error here, as
// they are a hang on a device. The order in which fibers are resumed alternates, so that a missing barrier shows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// The few calls of the runtime that launch code makes.
using cudaStream_t = struct HostSimStream*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;

namespace host_sim {

enum class Wait { nothing, block, warp };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  Wait wait;
  int exchanges;       // shuffles so far
  uint32_t posted[2];  // this lane's value in the last two of them
};

constexpr size_t kStack = 64 << 10;
constexpr size_t kWarp = 32;

struct Block {
  std::vector<Fiber> fibers;
  size_t live, current;
  ucontext_t scheduler;
  std::function<void()> body;
};
inline thread_local Block block;

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void wait_for(Wait what) {
  Fiber& me = block.fibers[block.current];
  me.wait = what;
  swapcontext(&me.context, &block.scheduler);
}

// Releases the waiting threads of [begin, end) if all live ones wait for `what`.
inline void release(size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i) {
    if (!block.fibers[i].done && block.fibers[i].wait != what) return;
  }
  for (size_t i = begin; i < end; ++i) block.fibers[i].wait = Wait::nothing;
}

inline void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
  fiber.done = false;
  fiber.wait = Wait::nothing;
  fiber.exchanges = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) start(block.fibers[i]);
  for (bool backwards = false;; backwards = !backwards) {
    size_t live = 0, resumed = 0;
    for (size_t n = 0; n < threads; ++n) {
      const size_t i = backwards ? threads - 1 - n : n;
      Fiber& fiber = block.fibers[i];
      live += !fiber.done;
      if (fiber.done || fiber.wait != Wait::nothing) continue;
      ++resumed;
      block.current = i;
      threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
      swapcontext(&block.scheduler, &fiber.context);
    }
    if (live == 0) return;
    for (size_t w = 0; w < threads; w += kWarp) release(w, w + kWarp < threads ? w + kWarp : threads, Wait::warp);
    release(0, threads, Wait::block);
    if (resumed == 0) {
      fprintf(stderr, "host_sim: the threads of a block wait for different things\n");
      abort();
    }
  }
}

template <class... P>
void run(void (*kernel)(P...), dim3 blocks, dim3 threads, P... arguments) {
  if (block.fibers.size() < threads.x) block.fibers.resize(threads.x);
  blockDim = threads;
  gridDim = blocks;
  block.body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(threads.x);
    }
  }
}

}  // namespace host_sim

inline void __syncthreads() {
  host_sim::wait_for(host_sim::Wait::block);
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int lanes) {
  using namespace host_sim;
  const size_t me = block.current;
  const int slot = block.fibers[me].exchanges++ % 2;
  block.fibers[me].posted[slot] = value;
  wait_for(Wait::warp);
  return block.fibers[me / kWarp * kWarp + ((me % kWarp) ^ static_cast<size_t>(lanes))].posted[slot];
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** address, void* host, unsigned) {
  *address = host;
  return cudaSuccess;
}
template <class Symbol>
cudaError_t cudaGetSymbolAddress(void** address, Symbol& symbol) {
  *address = &symbol;
  return cudaSuccess;
}
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return cudaSuccess;
}
