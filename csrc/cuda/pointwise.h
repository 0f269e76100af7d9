// Element-wise kernels of the linear and gated layers, and sums over rows. All arrays are dense.
#pragma once

#include <stdint.h>

#include "cuda/device.h"
#include "cuda/scratch.h"
#include "cuda/types.h"
#include "math/activation.h"

namespace spu::cuda {

// dz = dy * act'(saved), n values, rounded once. saved is the pre-activation, or the output for relu. dy may be dz.
void launch_dz(Type type, math::Act act, const void* dy, const void* saved, void* dz, int64_t n, cudaStream_t stream);

// out = act(z), or act(gate) * z with a gate, n values, rounded once. z may be out.
void launch_activation(Type type, math::Act act, const void* z, const void* gate, void* out, int64_t n,
                       cudaStream_t stream);

// With a = act(gate): dgate = dh * up * act'(gate), dup = dh * a, h = a * up; each n values, rounded once.
void launch_gated_dz(Type type, math::Act act, const void* dh, const void* gate, const void* up, void* dgate, void* dup,
                     void* h, int64_t n, cudaStream_t stream);

// main_grad (+)= *inv_scale * grad; *found_inf = 1 if a value of grad is not finite.
void launch_unscale(Type type, const void* grad, float* main_grad, const float* inv_scale, float* found_inf,
                    bool accumulate, int64_t n, cudaStream_t stream);

// *found_inf = 1 if one of n values is not finite.
void launch_find_nonfinite(Type type, const void* values, int64_t n, float* found_inf, cudaStream_t stream);

// The numbers 0 and 1 in the current device's memory.
const float* zero_and_one();

// What becomes of the sums over rows of dz [rows, cols]: main_grad (+)= *inv_scale * sum, or out = sum rounded.
struct RowSums {
  Type type;
  const void* dz;
  int64_t rows, cols;
  void* out = nullptr;  // of `type`, or null
  float* main_grad = nullptr;
  const float* inv_scale = nullptr;
  float* found_inf = nullptr;  // null: not wanted
  bool accumulate = false;
};
void launch_row_sums(const RowSums& sums, Scratch& scratch, cudaStream_t stream);

// dst = src over n values, each of its own type.
void launch_convert(Type from, const void* src, Type to, void* dst, int64_t n, cudaStream_t stream);

}  // namespace spu::cuda
