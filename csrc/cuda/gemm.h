// One matrix product with its epilogue, as the ops describe it and the kernels receive it.
//
//   forward  C = act(A B + bias), A and B rounded products of 16-bit values accumulated in fp32; preact = A B + bias
//            with a gate: C = act(gate) * (A B + bias), the second product of a gated layer
//   dx       C = A B, or with what an activation was taken of C = act'(saved) * (A B): the gradient inside an MLP
//   dw       main_grad (+)= inv_scale * A B in fp32, found_inf |= any non-finite element of A B
//
// Four sources of kernels: wgmma (sm_90a), mma (sm_75, sm_80 and later), cuBLASLt where a table asks for it, and plain
// FMA (any strides, fp32, any device).
#pragma once

#include <stdint.h>

#include "cuda/device.h"
#include "cuda/scratch.h"
#include "cuda/types.h"
#include "math/activation.h"

namespace spu::cuda {

enum class Form : int { forward = 0, dx = 1, dw = 2 };
constexpr int kForms = 3, kTensorCoreTypes = 2;

// The class of a product's sizes, for the choice of a tile; the names and bounds of spu.kernels.table.shape_class.
enum class ShapeClass : int { skinny = 0, deep = 1, small = 2, medium = 3, large = 4 };
constexpr int kClasses = 5;
ShapeClass shape_class(int64_t m, int64_t n, int64_t k);

// The tiles that a product is compiled with, or cuBLASLt; a form that has no small one uses the large one.
enum class Tile : int { large = 0, small = 1, library = 2 };

// Chooses the tile of each form, type and class, in this order (kForms * kTensorCoreTypes * kClasses values of Tile),
// for the devices of a capability (10 * major + minor). Before the first call the small tile serves skinny, deep and
// small products. False if the capability or a value is out of range.
bool set_tiles(int capability, const uint8_t* tiles, int64_t count);

// Element (i, j) of a matrix is at data[i * row + j * col], in elements of the product's type.
struct Operand {
  const void* data;
  int64_t row, col;
};

struct Gemm {
  Form form;
  Type type;        // of A, B, and (forward, dx) bias, out and preact
  int64_t m, n, k;  // A [m, k], B [k, n]
  Operand a, b;
  // forward, dx
  void* out = nullptr;          // [m, n], dense
  const void* bias = nullptr;   // [n]
  void* preact = nullptr;       // [m, n], dense, or null
  const void* gate = nullptr;   // [m, n], dense, or null
  const void* saved = nullptr;  // of dx, [m, n], dense, or null: the pre-activation, or relu's result
  math::Act act = math::Act::none;
  // dw; the scalars are in device memory
  float* main_grad = nullptr;  // [m, n], dense
  const float* inv_scale = nullptr;
  float* found_inf = nullptr;  // null: not wanted
  bool accumulate = false;     // false: main_grad is stored without being read
};

// Launches the product on the stream. cuBLASLt where the tiles say so and it takes the product; tensor cores where the
// device has them and a kernel for the type, and where A and B are laid out as torch's linear layer has them with
// 16-byte aligned rows; in other layouts cuBLASLt where it takes them; plain FMA otherwise.
void launch_gemm(const Gemm& g, int capability, cudaStream_t stream, Scratch& scratch);

// gemm_fma.cu: any strides, any type.
void launch_gemm_fma(const Gemm& g, cudaStream_t stream);

}  // namespace spu::cuda
