// Large fresh memory: asked for in large pages.
//
// A first write to a 4 KB page costs about 3 us per 16 KB here: 64 MB of new output took 55 ms to touch, against 6 ms
// once its pages were there. In pages of 2 MB it takes 12 ms. Where the kernel offers none this changes nothing.
#include <cstdint>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spu::cpu {

void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > start) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace spu::cpu
