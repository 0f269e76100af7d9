// AdamW in one pass (unscale, clip, step, 16-bit copy-out), and sums of squares, over lists of tensors.
#include "cuda/optim.h"

#include <algorithm>

#include "cuda/vector.h"
#include "math/adamw.h"

namespace spu {
namespace cuda {
namespace {

// A list of tensors as a kernel parameter. Tensor t owns blocks first[t] .. first[t + 1), one for each of its pieces.
template <class Item>
struct Group {
  Item item[kGroup];
  int first[kGroup + 1];
  int count;
};

int pieces_of(int64_t numel) {
  return static_cast<int>((numel + kPiece - 1) / kPiece);
}

// Calls f(group) for each group of a list; empty tensors are left out.
template <class Item, class F>
void for_groups(const std::vector<Item>& items, F f) {
  Group<Item> group = {};
  for (const Item& item : items) {
    if (item.numel == 0) continue;
    group.item[group.count] = item;
    group.first[group.count + 1] = group.first[group.count] + pieces_of(item.numel);
    if (++group.count == kGroup) {
      f(group);
      group = {};
    }
  }
  if (group.count > 0) f(group);
}

// The tensor that this block works on.
template <class Item>
SPU_DEVICE int tensor_of_block(const Group<Item>& group) {
  int low = 0, high = group.count;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.first[middle] <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

SPU_DEVICE math::AdamWStep step_of(double step, const AdamWSettings& s) {
  math::AdamWStep k;
  k.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
  k.one_minus_b1 = static_cast<float>(1.0 - s.beta1);
  k.b2 = static_cast<float>(s.beta2);
  k.one_minus_b2 = static_cast<float>(1.0 - s.beta2);
  k.step_size = static_cast<float>(s.lr / (1.0 - pow(s.beta1, step)));
  k.bias2_sqrt = static_cast<float>(sqrt(1.0 - pow(s.beta2, step)));
  k.eps = static_cast<float>(s.eps);
  return k;
}

SPU_DEVICE bool aligned(const void* a, const void* b, const void* c, const void* d, const void* e) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                        reinterpret_cast<uintptr_t>(c) | reinterpret_cast<uintptr_t>(d) |
                        reinterpret_cast<uintptr_t>(e);
  return all % 16 == 0;
}

template <Type T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Group<AdamWTensor> group, AdamWSettings settings) {
  __shared__ math::AdamWStep shared;
  if (*settings.found_inf != 0.0f) return;
  const int index = tensor_of_block(group);
  const AdamWTensor t = group.item[index];
  // Two powers in fp64 for a block, not for a thread: consumer cards are slow at them.
  if (threadIdx.x == 0) shared = step_of(*t.step, settings);
  __syncthreads();
  const math::AdamWStep k = shared;
  const float grad_scale = *settings.grad_scale;
  const bool wide = aligned(t.param, t.master, t.grad, t.exp_avg, t.exp_avg_sq);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - group.first[index]) * kPiece;
  const int64_t end = begin + kPiece < t.numel ? begin + kPiece : t.numel;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kVector; i < end; i += kThreads * kVector) {
    const Values g = load<Type::fp32>(t.grad, i, end, wide);
    Values p = load<Type::fp32>(t.master, i, end, wide);
    Values m = load<Type::fp32>(t.exp_avg, i, end, wide), v = load<Type::fp32>(t.exp_avg_sq, i, end, wide);
    for (int j = 0; j < kVector; ++j) {
      const math::AdamWState<float> s = math::adamw_step<float>({p.v[j], m.v[j], v.v[j]}, g.v[j] * grad_scale, k);
      p.v[j] = s.param;
      m.v[j] = s.m;
      v.v[j] = s.v;
    }
    store<Type::fp32>(t.master, i, end, wide, p);
    store<Type::fp32>(t.exp_avg, i, end, wide, m);
    store<Type::fp32>(t.exp_avg_sq, i, end, wide, v);
    if (T != Type::fp32) store<T>(t.param, i, end, wide, p);
  }
}

// The sum of `mine` over the block's threads, in thread 0, always added in the same order.
SPU_DEVICE double block_sum(double mine) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Squares are taken in fp64: those of fp32 gradients above 1.8e19 or below 1e-19 leave fp32's range.
__global__ void __launch_bounds__(kThreads)
    square_sum_kernel(const __grid_constant__ Group<Values1d> group, double* partial) {
  const int index = tensor_of_block(group);
  const Values1d t = group.item[index];
  const bool wide = aligned(t.data, t.data, t.data, t.data, t.data);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - group.first[index]) * kPiece;
  const int64_t end = begin + kPiece < t.numel ? begin + kPiece : t.numel;
  double sum = 0;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kVector; i < end; i += kThreads * kVector) {
    const Values x = load<Type::fp32>(t.data, i, end, wide);
    for (int j = 0; j < kVector; ++j) sum += static_cast<double>(x.v[j]) * x.v[j];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partial, int64_t count, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(sum);
}

}  // namespace

void launch_adamw(Type param_type, const std::vector<AdamWTensor>& tensors, const AdamWSettings& settings,
                  cudaStream_t stream) {
  for_groups(tensors, [&](const Group<AdamWTensor>& group) {
    with_type(param_type, [&](auto t) {
      launch(adamw_kernel<decltype(t)::value>, group.first[group.count], kThreads, stream, group, settings);
    });
  });
}

int64_t square_sum_pieces(const std::vector<Values1d>& tensors) {
  int64_t pieces = 0;
  for (const Values1d& t : tensors) pieces += pieces_of(t.numel);
  return pieces;
}

void launch_square_sum(const std::vector<Values1d>& tensors, double* partial, float* out, cudaStream_t stream) {
  int64_t done = 0;
  for_groups(tensors, [&](const Group<Values1d>& group) {
    const int blocks = group.first[group.count];
    launch(square_sum_kernel, blocks, kThreads, stream, group, partial + done);
    done += blocks;
  });
  launch(total_kernel, 1, kThreads, stream, partial, done, out);
}

}  // namespace cuda
}  // namespace spu
