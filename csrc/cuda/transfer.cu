// Batched copies with widening or narrowing on arrival: weights that are streamed in, gradients that are streamed out.
#include "cuda/transfer.h"

#include "cuda/group.h"

namespace spu::cuda {
namespace {

template <Type From, Type To>
__global__ void __launch_bounds__(kThreads) copies_kernel(const __grid_constant__ Group<Copy> group) {
  const int index = tensor_of_block(group);
  const Copy c = group.item[index];
  const bool wide = (reinterpret_cast<uintptr_t>(c.source) | reinterpret_cast<uintptr_t>(c.target)) % 16 == 0;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - group.first[index]) * kPiece;
  const int64_t end = begin + kPiece < c.numel ? begin + kPiece : c.numel;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kVector; i < end; i += kThreads * kVector) {
    store<To>(c.target, i, end, wide, load<From>(c.source, i, end, wide));
  }
}

}  // namespace

void launch_copies(const std::vector<Copy>& copies, cudaStream_t stream) {
  constexpr Type types[] = {Type::fp16, Type::bf16, Type::fp32};
  for (const Type from : types) {
    for (const Type to : types) {
      std::vector<Copy> pair;
      for (const Copy& copy : copies) {
        if (copy.from == from && copy.to == to) pair.push_back(copy);
      }
      for_groups(pair, [&](const Group<Copy>& group) {
        with_type(from, [&](auto f) {
          with_type(to, [&](auto t) {
            launch(copies_kernel<decltype(f)::value, decltype(t)::value>, group.first[group.count], kThreads, stream,
                   group);
          });
        });
      });
    }
  }
}

}  // namespace spu::cuda
