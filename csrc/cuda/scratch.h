// Memory that a launch works in.
#pragma once

#include <stdint.h>

namespace spu::cuda {

// Device memory for one op. Torch's allocator gives it: reused in the stream's order, and part of a CUDA graph that is
// being captured.
struct Scratch {
  virtual void* bytes(int64_t count) = 0;

 protected:
  ~Scratch() = default;
};

}  // namespace spu::cuda
