// Threads and each thread's scratch memory.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>

#include "cpu/help.h"
#include "cpu/kernels.h"

namespace spu::cpu {

int64_t threads() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

int64_t threads_for(const Product& p, int64_t least, int64_t shared) {
  if (p.m * p.n < least / p.k) return 1;
  return threads() + (p.m * p.n < shared / p.k ? 0 : lent_threads());
}

void parallel(const Shares& shares, RangeBody body, void* context) {
  if (shares.parts > threads() && share(shares, body, context)) return;
  if (threads() == 1) return body(context, 0, shares.count);
  in_turns(shares, body, context);
}

namespace {

// Buffers up to this size are kept for the thread's next call; larger ones go back when a smaller one is asked for.
// The largest product needs 2^23 and the rounding of its rows to whole micro-tiles.
constexpr int64_t kKeptFloats = (int64_t{1} << 23) + (int64_t{1} << 18);  // 33 MB

// From half of it on a buffer is made of large pages: the panels of a product are read again and again, 64 small pages
// at a time, which is all that the first level of a TLB holds.
constexpr int64_t kPageFloats = int64_t{1} << 19;  // 2 MB

struct Buffer {
  float* data = nullptr;
  int64_t floats = 0, uses = 0;

  ~Buffer() { std::free(data); }

  float* at_least(int64_t wanted) {
    ++uses;
    const bool shrink = floats > kKeptFloats && wanted <= kKeptFloats;
    if (wanted > floats || shrink) {
      std::free(data);
      data = nullptr;
      floats = 0;
      const bool large = wanted >= kPageFloats / 2;
      const int64_t unit = large ? kPageFloats : 1024, rounded = (wanted + unit - 1) / unit * unit;
      const size_t align = large ? static_cast<size_t>(kPageFloats) * sizeof(float) : 64;
      data = static_cast<float*>(std::aligned_alloc(align, static_cast<size_t>(rounded) * sizeof(float)));
      if (!data) throw std::bad_alloc();
      if (large) advise_large_pages(data, rounded * 4);
      floats = rounded;
    }
    return data;
  }
};

thread_local Buffer buffers[kSlots];

}  // namespace

float* workspace(int slot, int64_t floats) {
  return buffers[slot].at_least(floats);
}

int64_t workspace_uses(int slot) {
  return buffers[slot].uses;
}

}  // namespace spu::cpu
