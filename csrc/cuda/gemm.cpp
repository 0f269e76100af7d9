// Which kernel serves a matrix product.
#include "cuda/gemm.h"

#include <cstring>
#include <limits>

#include "cuda/gemm_library.h"
#include "cuda/gemm_tensor_core.h"
#include "cuda/pointwise.h"

namespace spu::cuda {
namespace {

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Rows of 16-bit values that start at multiples of 16 bytes, one after another, as the tensor-core kernels read.
bool rows_aligned(const void* data, int64_t length, int64_t stride) {
  return aligned(data) && length % 8 == 0 && stride % 8 == 0 && stride >= length;
}

// The layouts that the kernels of a form are compiled for: those of torch's linear layer.
bool laid_out(const Gemm& g) {
  const bool a_by_rows = g.form != Form::dw, b_by_rows = g.form != Form::forward;
  const int64_t a_inner = a_by_rows ? g.a.col : g.a.row, a_outer = a_by_rows ? g.a.row : g.a.col;
  const int64_t b_inner = b_by_rows ? g.b.col : g.b.row, b_outer = b_by_rows ? g.b.row : g.b.col;
  const int64_t a_length = a_by_rows ? g.k : g.m, b_length = b_by_rows ? g.n : g.k;
  constexpr int64_t most = std::numeric_limits<int>::max();
  return a_inner == 1 && b_inner == 1 && rows_aligned(g.a.data, a_length, a_outer) &&
         rows_aligned(g.b.data, b_length, b_outer) && g.n % 8 == 0 && aligned(g.bias) && aligned(g.out) &&
         aligned(g.preact) && aligned(g.gate) && aligned(g.main_grad) && g.k > 0 && g.m <= most && g.n <= most &&
         g.k <= most;
}

// Kernels of one type, by form and tile.
using Kernels = TensorCoreGemm[kForms][2];
#define SPU_TWO_TILES(arch, form, type) \
  {gemm_sm##arch##_##form##_##type##_large, gemm_sm##arch##_##form##_##type##_small}
#define SPU_ONE_TILE(arch, form, type) \
  {gemm_sm##arch##_##form##_##type##_large, gemm_sm##arch##_##form##_##type##_large}
#define SPU_MMA_KERNELS(arch, type) \
  {SPU_TWO_TILES(arch, forward, type), SPU_TWO_TILES(arch, dx, type), SPU_ONE_TILE(arch, dw, type)}
#define SPU_WGMMA_KERNELS(type) \
  {SPU_ONE_TILE(90, forward, type), SPU_ONE_TILE(90, dx, type), SPU_ONE_TILE(90, dw, type)}

#if SPU_SM75
constexpr Kernels kSm75 = SPU_MMA_KERNELS(75, fp16);
#endif
#if SPU_SM80
constexpr Kernels kSm80[kTensorCoreTypes] = {SPU_MMA_KERNELS(80, fp16), SPU_MMA_KERNELS(80, bf16)};
#endif
#if SPU_SM90
constexpr Kernels kSm90[kTensorCoreTypes] = {SPU_WGMMA_KERNELS(fp16), SPU_WGMMA_KERNELS(bf16)};
#endif

// The tiles chosen for the devices of one capability.
struct Tiles {
  bool set;
  uint8_t of[kForms][kTensorCoreTypes][kClasses];
};
constexpr int kCapabilities = 256;
Tiles tiles[kCapabilities];

Tile tile_for(const Gemm& g, int capability) {
  const ShapeClass size = shape_class(g.m, g.n, g.k);
  const Tiles& chosen = tiles[capability];
  if (chosen.set) {
    return static_cast<Tile>(chosen.of[static_cast<int>(g.form)][static_cast<int>(g.type)][static_cast<int>(size)]);
  }
  return size == ShapeClass::medium || size == ShapeClass::large ? Tile::large : Tile::small;
}

TensorCoreGemm tensor_core_kernel(const Gemm& g, [[maybe_unused]] int capability, Tile wanted) {
  if (g.type == Type::fp32 || !laid_out(g)) return nullptr;
  [[maybe_unused]] const int type = static_cast<int>(g.type), form = static_cast<int>(g.form);
  [[maybe_unused]] const int tile = wanted == Tile::small ? 1 : 0;
#if SPU_SM90
  if (capability == 90) return kSm90[type][form][tile];  // the "a" of sm_90a: for this architecture alone
#endif
#if SPU_SM80
  if (capability >= 80) return kSm80[type][form][tile];
#endif
#if SPU_SM75
  if (capability >= 75 && capability < 80 && g.type == Type::fp16) return kSm75[form][tile];
#endif
  return nullptr;
}

}  // namespace

ShapeClass shape_class(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t side = 128;
  if (m <= 64) return ShapeClass::skinny;
  const int64_t count = ((m + side - 1) / side) * ((n + side - 1) / side);
  if (count <= 128) return k >= 8192 ? ShapeClass::deep : ShapeClass::small;
  return count <= 1024 ? ShapeClass::medium : ShapeClass::large;
}

bool set_tiles(int capability, const uint8_t* values, int64_t count) {
  constexpr int64_t wanted = kForms * kTensorCoreTypes * kClasses;
  if (capability < 0 || capability >= kCapabilities || count != wanted) return false;
  for (int64_t i = 0; i < wanted; ++i) {
    if (values[i] > static_cast<uint8_t>(Tile::library)) return false;
  }
  std::memcpy(tiles[capability].of, values, static_cast<size_t>(wanted));
  tiles[capability].set = true;
  return true;
}

void launch_gemm(const Gemm& g, int capability, cudaStream_t stream, Scratch& scratch) {
  const bool known = g.type != Type::fp32 && capability >= 0 && capability < kCapabilities;
  const Tile tile = known ? tile_for(g, capability) : Tile::large;
  if (tile == Tile::library && launch_gemm_library(g, stream, scratch)) return;
  const TensorCoreGemm kernel = known ? tensor_core_kernel(g, capability, tile) : nullptr;
  if (kernel == nullptr) {
    // Layouts that no kernel here is compiled for, such as that of a cross-entropy's fp32 logits, may be cuBLASLt's.
    const bool other = known && tile != Tile::library && !laid_out(g);
    if (!other || !launch_gemm_library(g, stream, scratch)) launch_gemm_fma(g, stream);
    return;
  }
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (!kernel(g, multiprocessors, stream)) {
    check(cudaGetLastError(), "a matrix product's launch");
    throw std::runtime_error("spu._cuda: a matrix product of this shape could not be launched");
  }
  if (g.saved != nullptr) launch_dz(g.type, g.act, g.out, g.saved, g.out, g.m * g.n, stream);
}

}  // namespace spu::cuda
