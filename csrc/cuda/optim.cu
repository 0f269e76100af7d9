// AdamW in one pass (unscale, clip, step, 16-bit copy-out), and sums of squares, over lists of tensors.
#include "cuda/optim.h"

#include "cuda/codes.h"
#include "cuda/group.h"
#include "math/adamw.h"

namespace spu::cuda {
namespace {

template <class... P>
SPU_DEVICE bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

using math::Moments;

// What one thread needs of its block's tensor beside the values.
struct Place {
  int64_t i, end, numel;  // this thread's values are i .. i + kVector, those from `end` on are not there
  bool wide;
};

template <Moments M, bool Signed>
SPU_DEVICE Values load_moment(const void* moment, const Place& p) {
  if (M == Moments::fp32) return load<Type::fp32>(moment, p.i, p.end, p.wide);
  if (M == Moments::bf16) return load<Type::bf16>(moment, p.i, p.end, p.wide);
  Values x = {};
  if (p.i >= p.end) return x;
  const uint8_t* codes = static_cast<const uint8_t*>(moment) + math::moment_scale_bytes(p.numel);
  const float scale = static_cast<const float*>(moment)[p.i / math::kMomentBlock];
  uint32_t code[kVector];
  load_codes<8>(codes, p.i, p.end, p.wide, code);
  for (int j = 0; j < kVector; ++j) x.v[j] = math::moment_value<Signed, float>(code[j]) * scale;
  return x;
}

// noise: the 16 bits of each value. For 8-bit moments all threads of a warp must come here, also those without values:
// the threads of a block of values find its scale by exchanging maxima.
template <Moments M, bool Signed>
SPU_DEVICE void store_moment(void* moment, const Place& p, const Values& x, const uint32_t* noise) {
  if (M == Moments::fp32) return store<Type::fp32>(moment, p.i, p.end, p.wide, x);
  if (M == Moments::bf16) {
    Values rounded;  // patterns without low bits: the store rounds no more
    for (int j = 0; j < kVector; ++j) {
      rounded.v[j] = math::Ops<float>::from_bits(math::stochastic_bf16<float>(x.v[j], noise[j]) << 16);
    }
    return store<Type::bf16>(moment, p.i, p.end, p.wide, rounded);
  }
  uint32_t top = 0;
  for (int j = 0; j < kVector; ++j) {
    const uint32_t magnitude = p.i + j < p.end ? math::Ops<float>::bits(x.v[j]) & 0x7fffffffu : 0u;
    top = magnitude > top ? magnitude : top;
  }
  for (int lane = 1; lane < math::kMomentBlock / kVector; lane *= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, top, lane);
    top = other > top ? other : top;
  }
  if (p.i >= p.end) return;
  const float scale = math::moment_scale<Signed>(math::Ops<float>::from_bits(top));
  if (p.i % math::kMomentBlock == 0) static_cast<float*>(moment)[p.i / math::kMomentBlock] = scale;
  uint32_t codes[kVector] = {};
  if (scale > 0.0f) {
    const bool infinite = !Signed && top == 0x7f800000u;
    for (int j = 0; j < kVector; ++j) {
      codes[j] = infinite ? math::MomentCode<Signed>::kMost : math::moment_code<Signed, float>(x.v[j], scale, noise[j]);
    }
  }
  store_codes<8>(static_cast<uint8_t*>(moment) + math::moment_scale_bytes(p.numel), p.i, p.end, p.wide, codes);
}

template <Type T, Moments M>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Group<math::AdamWItem> group, AdamWSettings settings) {
  __shared__ math::AdamWStep shared;
  if (*settings.found_inf != 0.0f) return;
  const int index = tensor_of_block(group);
  const math::AdamWItem t = group.item[index];
  const AdamWSettings& s = settings;
  // Two powers in fp64 for a block, not for a thread: consumer GPUs are slow at them.
  if (threadIdx.x == 0) shared = math::adamw_constants(*t.step, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay);
  __syncthreads();
  const math::AdamWStep k = shared;
  const uint32_t seed = math::moment_seed(*t.step);
  const float grad_scale = *settings.grad_scale;
  const bool wide = aligned(t.param, t.master, t.grad, t.exp_avg, t.exp_avg_sq);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - group.first[index]) * kPiece;
  const int64_t end = begin + kPiece < t.numel ? begin + kPiece : t.numel;
  // All threads run the loop equally often, for the exchange.
  for (int64_t base = begin; base < end; base += kThreads * kVector) {
    const Place place = {base + static_cast<int64_t>(threadIdx.x) * kVector, end, t.numel, wide};
    const int64_t i = place.i;
    const Values g = load<Type::fp32>(t.grad, i, end, wide);
    Values p = load<Type::fp32>(t.master, i, end, wide);
    Values m = load_moment<M, true>(t.exp_avg, place), v = load_moment<M, false>(t.exp_avg_sq, place);
    // After the moments: before them, decoding 8-bit ones spills registers on sm_86 to sm_90.
    if (T != Type::fp32) {
      const Values weight = load<T>(t.param, i, end, wide);
      for (int j = 0; j < kVector; ++j) {
        p.v[j] = math::following<float>(p.v[j], widen<T>(narrow<T>(p.v[j])), weight.v[j]);
      }
    }
    uint32_t low[kVector], high[kVector];
    for (int j = 0; j < kVector; ++j) {
      const math::AdamWState<float> next = math::adamw_step<float>({p.v[j], m.v[j], v.v[j]}, g.v[j] * grad_scale, k);
      p.v[j] = next.param;
      m.v[j] = next.m;
      v.v[j] = next.v;
      const uint32_t noise = M == Moments::fp32 ? 0 : math::moment_noise<uint32_t>(static_cast<uint32_t>(i + j), seed);
      low[j] = noise & 0xffffu;
      high[j] = noise >> 16;
    }
    store<Type::fp32>(t.master, i, end, wide, p);
    store_moment<M, true>(t.exp_avg, place, m, low);
    store_moment<M, false>(t.exp_avg_sq, place, v, high);
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
  const bool wide = aligned(t.data);
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

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partial, int64_t count, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace

void launch_adamw(Type param_type, Moments moments, const std::vector<math::AdamWItem>& tensors,
                  const AdamWSettings& settings, cudaStream_t stream) {
  for_groups(tensors, [&](const Group<math::AdamWItem>& group) {
    with_type(param_type, [&](auto t) {
      constexpr Type T = decltype(t)::value;
      const auto kernel = moments == Moments::fp32   ? adamw_kernel<T, Moments::fp32>
                          : moments == Moments::bf16 ? adamw_kernel<T, Moments::bf16>
                                                     : adamw_kernel<T, Moments::int8>;
      launch(kernel, group.first[group.count], kThreads, stream, group, settings);
    });
  });
}

int64_t square_sum_pieces(const std::vector<Values1d>& tensors) {
  int64_t pieces = 0;
  for (const Values1d& t : tensors) pieces += pieces_of(t.numel);
  return pieces;
}

void launch_square_sum(const std::vector<Values1d>& tensors, double* partial, double* out, cudaStream_t stream) {
  int64_t done = 0;
  for_groups(tensors, [&](const Group<Values1d>& group) {
    const int blocks = group.first[group.count];
    launch(square_sum_kernel, blocks, kThreads, stream, group, partial + done);
    done += blocks;
  });
  launch(total_kernel, 1, kThreads, stream, partial, done, out);
}

}  // namespace spu::cuda
