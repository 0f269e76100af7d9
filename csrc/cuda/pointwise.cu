// Element-wise kernels: eight values a thread, fp32 inside, one rounding.
#include "cuda/pointwise.h"

#include "cuda/vector.h"

namespace spu::cuda {
namespace {

using math::Act;

template <Act A>
struct ActTag {
  static constexpr Act value = A;
};

template <class F>
void with_act(Act act, F f) {
  switch (act) {
    case Act::relu:
      return f(ActTag<Act::relu>{});
    case Act::gelu:
      return f(ActTag<Act::gelu>{});
    case Act::gelu_tanh:
      return f(ActTag<Act::gelu_tanh>{});
    case Act::silu:
      return f(ActTag<Act::silu>{});
    default:
      return f(ActTag<Act::none>{});
  }
}

// Four blocks a multiprocessor: left to itself ptxas aims at 40 registers for some activations, and spills.
template <Type T, Act A>
__global__ void __launch_bounds__(kThreads, 4)
    dz_kernel(const void* dy, const void* saved, void* dz, int64_t n, bool wide) {
  for (int64_t i = first_value(); i < n; i += grid_values()) {
    Values g = load<T>(dy, i, n, wide);
    const Values s = load<T>(saved, i, n, wide);
    for (int j = 0; j < kVector; ++j) g.v[j] = math::activate_backward<A, float>(g.v[j], s.v[j]);
    store<T>(dz, i, n, wide, g);
  }
}

struct Gated {
  const void *dh, *gate, *up;
  void *dgate, *dup, *h;
};

template <Type T, Act A>
__global__ void __launch_bounds__(kThreads) gated_dz_kernel(Gated p, int64_t n, bool wide) {
  for (int64_t i = first_value(); i < n; i += grid_values()) {
    const Values dh = load<T>(p.dh, i, n, wide), gate = load<T>(p.gate, i, n, wide), up = load<T>(p.up, i, n, wide);
    Values dgate, dup, h;
    for (int j = 0; j < kVector; ++j) {
      const float a = math::activate<A, float>(gate.v[j]);
      dgate.v[j] = math::activate_backward<A, float>(dh.v[j] * up.v[j], gate.v[j]);
      dup.v[j] = dh.v[j] * a;
      h.v[j] = a * up.v[j];
    }
    store<T>(p.dgate, i, n, wide, dgate);
    store<T>(p.dup, i, n, wide, dup);
    store<T>(p.h, i, n, wide, h);
  }
}

template <Type T, bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    unscale_kernel(const void* grad, float* main_grad, const float* inv_scale, float* found_inf, int64_t n, bool wide) {
  const float scale = *inv_scale;
  bool bad = false;
  for (int64_t i = first_value(); i < n; i += grid_values()) {
    Values g = load<T>(grad, i, n, wide), before;
    if (kAccumulate) before = load<Type::fp32>(main_grad, i, n, wide);
    for (int j = 0; j < kVector; ++j) {
      bad = bad || math::is_nonfinite<float>(g.v[j]);
      g.v[j] = kAccumulate ? before.v[j] + g.v[j] * scale : g.v[j] * scale;
    }
    store<Type::fp32>(main_grad, i, n, wide, g);
  }
  if (bad) raise_flag(found_inf);
}

template <Type From, Type To>
__global__ void __launch_bounds__(kThreads) convert_kernel(const void* src, void* dst, int64_t n, bool wide) {
  for (int64_t i = first_value(); i < n; i += grid_values()) store<To>(dst, i, n, wide, load<From>(src, i, n, wide));
}

constexpr int kLanes = 8;                   // threads side by side in one row
constexpr int kColumns = kLanes * kVector;  // columns of a block
constexpr int kStrips = kThreads / kLanes;  // rows read at once
constexpr int kAhead = 4;                   // rows that a thread has under way
constexpr int kRun = 16;                    // rows of a strip that are added before the total
static_assert(kRun % kAhead == 0, "a run ends with a thread's rows");
constexpr int64_t kPartRows = 512, kMostParts = 64;

template <Type T>
SPU_DEVICE void finish_sum(const RowSums& p, int64_t column, float sum) {
  if (p.out != nullptr) return store_one<T>(p.out, column, sum);
  if (p.found_inf != nullptr && math::is_nonfinite<float>(sum)) raise_flag(p.found_inf);
  const float value = sum * *p.inv_scale;
  p.main_grad[column] = p.accumulate ? p.main_grad[column] + value : value;
}

// A block sums kColumns columns of one part of the rows, `chunk` of them: strip s adds rows s, s + kStrips, ... in
// runs, whose sums are then added, so that rounding grows with the sum of the lengths and not with their product.
// parts [part, cols] takes the sums; null: there is one part. The order depends on no launch setting.
template <Type T>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(RowSums p, float* parts, int64_t chunk, bool wide) {
  __shared__ float sums[kStrips][kColumns];
  const int lane = threadIdx.x % kLanes, strip = threadIdx.x / kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane * kVector;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * chunk;
  const int64_t last = first + chunk < p.rows ? first + chunk : p.rows;
  Values total = {}, run = {};
  int length = 0;
  for (int64_t r = first + strip; r < last && column < p.cols; r += kAhead * kStrips) {
    Values x[kAhead];
    SPU_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int64_t row = r + a * kStrips;
      x[a] = row < last ? load<T>(p.dz, row * p.cols + column, (row + 1) * p.cols, wide) : Values{};
    }
    SPU_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      for (int j = 0; j < kVector; ++j) run.v[j] += x[a].v[j];
    }
    length += kAhead;
    if (length == kRun) {
      for (int j = 0; j < kVector; ++j) total.v[j] += run.v[j];
      run = Values{};
      length = 0;
    }
  }
  for (int j = 0; j < kVector; ++j) sums[strip][lane * kVector + j] = total.v[j] + run.v[j];
  for (int half = kStrips / 2; half > 0; half /= 2) {
    __syncthreads();
    if (strip < half) {
      for (int j = lane * kVector; j < (lane + 1) * kVector; ++j) sums[strip][j] += sums[strip + half][j];
    }
  }
  __syncthreads();
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (threadIdx.x >= kColumns || mine >= p.cols) return;
  const float sum = sums[0][threadIdx.x];
  if (parts != nullptr) {
    parts[static_cast<int64_t>(blockIdx.y) * p.cols + mine] = sum;
  } else {
    finish_sum<T>(p, mine, sum);
  }
}

// The second sum, a thread a column, over the parts in order.
template <Type T>
__global__ void __launch_bounds__(kThreads) row_parts_kernel(RowSums p, const float* parts, int count) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= p.cols) return;
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += parts[i * p.cols + column];
  finish_sum<T>(p, column, sum);
}

template <Type T, Act A>
__global__ void __launch_bounds__(kThreads, 4)
    activation_kernel(const void* z, const void* gate, void* out, int64_t n, bool wide) {
  for (int64_t i = first_value(); i < n; i += grid_values()) {
    Values x = load<T>(z, i, n, wide);
    if (gate != nullptr) {
      const Values g = load<T>(gate, i, n, wide);
      for (int j = 0; j < kVector; ++j) x.v[j] = math::activate<A, float>(g.v[j]) * x.v[j];
    } else {
      for (int j = 0; j < kVector; ++j) x.v[j] = math::activate<A, float>(x.v[j]);
    }
    store<T>(out, i, n, wide, x);
  }
}

template <Type T>
__global__ void __launch_bounds__(kThreads)
    find_nonfinite_kernel(const void* values, float* found_inf, int64_t n, bool wide) {
  bool bad = false;
  for (int64_t i = first_value(); i < n; i += grid_values()) {
    const Values x = load<T>(values, i, n, wide);
    for (int j = 0; j < kVector; ++j) bad = bad || math::is_nonfinite<float>(x.v[j]);
  }
  if (bad) raise_flag(found_inf);
}

__device__ float zero_one[2] = {0.0f, 1.0f};

template <class... P>
bool all_aligned(P... pointers) {
  return (aligned16(pointers) && ...);
}

}  // namespace

void launch_dz(Type type, Act act, const void* dy, const void* saved, void* dz, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool wide = all_aligned(dy, saved, dz);
  with_type(type, [&](auto t) {
    with_act(act, [&](auto a) {
      launch(dz_kernel<decltype(t)::value, decltype(a)::value>, grid_for(n), kThreads, stream, dy, saved, dz, n, wide);
    });
  });
}

void launch_gated_dz(Type type, Act act, const void* dh, const void* gate, const void* up, void* dgate, void* dup,
                     void* h, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const Gated p = {dh, gate, up, dgate, dup, h};
  const bool wide = all_aligned(dh, gate, up, dgate, dup, h);
  with_type(type, [&](auto t) {
    with_act(act, [&](auto a) {
      launch(gated_dz_kernel<decltype(t)::value, decltype(a)::value>, grid_for(n), kThreads, stream, p, n, wide);
    });
  });
}

void launch_unscale(Type type, const void* grad, float* main_grad, const float* inv_scale, float* found_inf,
                    bool accumulate, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool wide = all_aligned(grad, main_grad);
  with_type(type, [&](auto t) {
    constexpr Type T = decltype(t)::value;
    launch(accumulate ? unscale_kernel<T, true> : unscale_kernel<T, false>, grid_for(n), kThreads, stream, grad,
           main_grad, inv_scale, found_inf, n, wide);
  });
}

void launch_row_sums(const RowSums& sums, Scratch& scratch, cudaStream_t stream) {
  if (sums.cols == 0) return;
  const bool wide = aligned16(sums.dz) && sums.cols * size_of(sums.type) % 16 == 0;
  const int64_t wanted = (sums.rows + kPartRows - 1) / kPartRows, most = wanted < kMostParts ? wanted : kMostParts;
  const int64_t share = most > 1 ? (sums.rows + most - 1) / most : sums.rows;
  const int64_t chunk = most > 1 ? (share + kStrips - 1) / kStrips * kStrips : share;
  const int count = most > 1 ? static_cast<int>((sums.rows + chunk - 1) / chunk) : 1;
  float* parts = nullptr;
  if (count > 1) parts = static_cast<float*>(scratch.bytes(count * sums.cols * static_cast<int64_t>(sizeof(float))));
  const dim3 blocks(static_cast<unsigned>((sums.cols + kColumns - 1) / kColumns), static_cast<unsigned>(count));
  const unsigned columns = static_cast<unsigned>((sums.cols + kThreads - 1) / kThreads);
  with_type(sums.type, [&](auto t) {
    constexpr Type T = decltype(t)::value;
    launch(row_sums_kernel<T>, blocks, kThreads, stream, sums, parts, chunk, wide);
    if (count > 1) launch(row_parts_kernel<T>, columns, kThreads, stream, sums, parts, count);
  });
}

void launch_activation(Type type, Act act, const void* z, const void* gate, void* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool wide = all_aligned(z, gate, out);
  with_type(type, [&](auto t) {
    with_act(act, [&](auto a) {
      launch(activation_kernel<decltype(t)::value, decltype(a)::value>, grid_for(n), kThreads, stream, z, gate, out, n,
             wide);
    });
  });
}

void launch_find_nonfinite(Type type, const void* values, int64_t n, float* found_inf, cudaStream_t stream) {
  if (n == 0) return;
  const bool wide = aligned16(values);
  with_type(type, [&](auto t) {
    launch(find_nonfinite_kernel<decltype(t)::value>, grid_for(n), kThreads, stream, values, found_inf, n, wide);
  });
}

const float* zero_and_one() {
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, zero_one), "cudaGetSymbolAddress");
  return static_cast<const float*>(address);
}

void launch_convert(Type from, const void* src, Type to, void* dst, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool wide = all_aligned(src, dst);
  with_type(from, [&](auto f) {
    with_type(to, [&](auto t) {
      launch(convert_kernel<decltype(f)::value, decltype(t)::value>, grid_for(n), kThreads, stream, src, dst, n, wide);
    });
  });
}

}  // namespace spu::cuda
