// The matrix product without tensor cores: any strides, any type, any device. It serves fp32, ragged and unaligned
// operands, and bf16 below sm_80.
#include "cuda/gemm.h"
#include "cuda/vector.h"

namespace spu::cuda {
namespace {

using math::Act;

constexpr int kTile = 64;             // rows and columns of C that a block makes
constexpr int kDepth = 16;            // of A and B in shared memory at once
constexpr int kMine = 4;              // rows and columns of C that a thread makes
constexpr int kSide = kTile / kMine;  // threads along a side of the tile
static_assert(kSide * kSide == kThreads, "a block has kThreads threads");

SPU_DEVICE float activate(Act act, float z) {
  switch (act) {
    case Act::relu:
      return math::relu<float>(z);
    case Act::gelu:
      return math::gelu<float>(z);
    case Act::gelu_tanh:
      return math::gelu_tanh<float>(z);
    case Act::silu:
      return math::silu<float>(z);
    default:
      return z;
  }
}

SPU_DEVICE float activate_backward(Act act, float dy, float saved) {
  switch (act) {
    case Act::relu:
      return math::activate_backward<Act::relu, float>(dy, saved);
    case Act::gelu:
      return math::activate_backward<Act::gelu, float>(dy, saved);
    case Act::gelu_tanh:
      return math::activate_backward<Act::gelu_tanh, float>(dy, saved);
    case Act::silu:
      return math::activate_backward<Act::silu, float>(dy, saved);
    default:
      return dy;
  }
}

// Tile [kDepth][kTile] of a matrix whose element (d, i) is at data[d * deep + i * wide].
template <Type T>
SPU_DEVICE void fill(float (*tile)[kTile], const void* data, int64_t deep, int64_t wide, int64_t depth, int64_t depths,
                     int64_t start, int64_t count) {
  // Neighbouring threads read neighbouring addresses, whichever dimension that is.
  const bool along = wide == 1;
  for (int e = static_cast<int>(threadIdx.x); e < kDepth * kTile; e += kThreads) {
    const int d = along ? e / kTile : e % kDepth, i = along ? e % kTile : e / kDepth;
    const bool inside = depth + d < depths && start + i < count;
    tile[d][i] = inside ? load_one<T>(data, (depth + d) * deep + (start + i) * wide) : 0.0f;
  }
}

template <Type T>
SPU_DEVICE bool finish(const Gemm& g, int64_t i, int64_t j, float sum) {
  const int64_t at = i * g.n + j;
  if (g.saved != nullptr) {
    store_one<T>(g.out, at, activate_backward(g.act, sum, load_one<T>(g.saved, at)));
    return false;
  }
  if (g.form != Form::dw) {
    const float z = g.bias != nullptr ? sum + load_one<T>(g.bias, j) : sum;
    if (g.preact != nullptr) store_one<T>(g.preact, at, z);
    store_one<T>(g.out, at, g.gate != nullptr ? activate(g.act, load_one<T>(g.gate, at)) * z : activate(g.act, z));
    return false;
  }
  const float value = sum * *g.inv_scale;
  g.main_grad[at] = g.accumulate ? g.main_grad[at] + value : value;
  return math::is_nonfinite<float>(sum);
}

template <Type T>
__global__ void __launch_bounds__(kThreads) gemm_fma_kernel(Gemm g) {
  __shared__ float a[kDepth][kTile], b[kDepth][kTile];
  // rows along x, of which a grid may have 2^31: there are more tokens than features
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile, column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int y = static_cast<int>(threadIdx.x) / kSide, x = static_cast<int>(threadIdx.x) % kSide;
  float sum[kMine][kMine] = {};
  for (int64_t depth = 0; depth < g.k; depth += kDepth) {
    fill<T>(a, g.a.data, g.a.col, g.a.row, depth, g.k, row, g.m);
    fill<T>(b, g.b.data, g.b.row, g.b.col, depth, g.k, column, g.n);
    __syncthreads();
    // A tile is summed by itself: rounding then grows with k / kDepth, not with k.
    float part[kMine][kMine] = {};
    for (int d = 0; d < kDepth; ++d) {
      for (int i = 0; i < kMine; ++i) {
        for (int j = 0; j < kMine; ++j) {
          part[i][j] = math::Ops<float>::fma(a[d][y + i * kSide], b[d][x + j * kSide], part[i][j]);
        }
      }
    }
    for (int i = 0; i < kMine; ++i) {
      for (int j = 0; j < kMine; ++j) sum[i][j] += part[i][j];
    }
    __syncthreads();
  }
  bool bad = false;
  // unrolled, or some compilers' sums lie in local memory to be indexed
  SPU_UNROLL
  for (int i = 0; i < kMine; ++i) {
    SPU_UNROLL
    for (int j = 0; j < kMine; ++j) {
      const int64_t r = row + y + i * kSide, c = column + x + j * kSide;
      if (r < g.m && c < g.n) bad = finish<T>(g, r, c, sum[i][j]) || bad;
    }
  }
  if (bad && g.found_inf != nullptr) raise_flag(g.found_inf);
}

}  // namespace

void launch_gemm_fma(const Gemm& g, cudaStream_t stream) {
  if (g.m == 0 || g.n == 0) return;
  const dim3 blocks(static_cast<unsigned>((g.m + kTile - 1) / kTile), static_cast<unsigned>((g.n + kTile - 1) / kTile));
  with_type(g.type, [&](auto t) { launch(gemm_fma_kernel<decltype(t)::value>, blocks, kThreads, stream, g); });
}

}  // namespace spu::cuda
