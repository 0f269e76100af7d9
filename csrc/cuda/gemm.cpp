// Which kernel serves a matrix product.
#include "cuda/gemm.h"

#include <limits>

#include "cuda/gemm_tensor_core.h"

namespace spu {
namespace cuda {
namespace {

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Rows of 16-bit values that start at multiples of 16 bytes, one after another: what the tensor-core kernels read.
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
         aligned(g.preact) && aligned(g.main_grad) && g.k > 0 && g.m <= most && g.n <= most && g.k <= most;
}

#if SPU_SM75
constexpr TensorCoreGemm kSm75[3] = {gemm_sm75_forward_fp16, gemm_sm75_dx_fp16, gemm_sm75_dw_fp16};
#endif
#if SPU_SM80
constexpr TensorCoreGemm kSm80[2][3] = {{gemm_sm80_forward_fp16, gemm_sm80_dx_fp16, gemm_sm80_dw_fp16},
                                        {gemm_sm80_forward_bf16, gemm_sm80_dx_bf16, gemm_sm80_dw_bf16}};
#endif
#if SPU_SM90
constexpr TensorCoreGemm kSm90[2][3] = {{gemm_sm90_forward_fp16, gemm_sm90_dx_fp16, gemm_sm90_dw_fp16},
                                        {gemm_sm90_forward_bf16, gemm_sm90_dx_bf16, gemm_sm90_dw_bf16}};
#endif

TensorCoreGemm tensor_core_kernel(const Gemm& g, int capability) {
  [[maybe_unused]] const int type = static_cast<int>(g.type), form = static_cast<int>(g.form);
  if (g.type == Type::fp32 || !laid_out(g)) return nullptr;
#if SPU_SM90
  if (capability == 90) return kSm90[type][form];  // the "a" of sm_90a: for this architecture alone
#endif
#if SPU_SM80
  if (capability >= 80) return kSm80[type][form];
#endif
#if SPU_SM75
  if (capability >= 75 && capability < 80 && g.type == Type::fp16) return kSm75[form];
#endif
  (void)capability;
  return nullptr;
}

}  // namespace

void launch_gemm(const Gemm& g, int capability, cudaStream_t stream) {
  const TensorCoreGemm kernel = tensor_core_kernel(g, capability);
  if (kernel == nullptr) return launch_gemm_fma(g, stream);
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (!kernel(g, multiprocessors, stream)) {
    check(cudaGetLastError(), "a matrix product's launch");
    throw std::runtime_error("spu._cuda: a matrix product of this shape could not be launched");
  }
}

}  // namespace cuda
}  // namespace spu
