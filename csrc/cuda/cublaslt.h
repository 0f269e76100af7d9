// cuBLASLt as torch has loaded it: looked up at the first need, never linked to, so that one binary serves torch of any
// CUDA and loads where there is none. The few types, numbers and functions that products need are declared here, after
// the interface that NVIDIA documents; they are part of the library's binary interface and have not changed within or
// between the versions that `cublaslt` accepts. cublaslt_check.cpp compares them with the toolkit's header where a
// build has it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

#include "cuda/device.h"

namespace spu::cuda {
namespace lt {

// Types that only the library looks into.
struct Context;
struct Description;
struct Layout;
struct Preference;

using Status = int;
constexpr Status kSuccess = 0, kNotSupported = 15;

enum DataType : int { kFloat = 0, kHalf = 2, kBfloat16 = 14 };  // cudaDataType
constexpr int kComputeFloat = 68;                               // cublasComputeType_t: sums in fp32, inputs as they are
enum Operation : int32_t { kAsStored = 0, kTransposed = 1 };    // cublasOperation_t
enum PointerMode : int32_t { kOnHost = 0, kOnDevice = 1 };      // cublasLtPointerMode_t

enum Attribute : int {  // cublasLtMatmulDescAttributes_t
  kPointerMode = 2,     // int32_t
  kTransposeA = 3,      // int32_t
  kTransposeB = 4,      // int32_t
  kEpilogue = 7,        // uint32_t
  kBiasPointer = 8,     // const void*
  kAuxPointer = 11,     // void*
  kAuxStride = 12,      // int64_t, elements
};

enum Epilogue : uint32_t {  // cublasLtEpilogue_t
  kPlain = 1,
  kBias = 4,
  kGelu = 32,  // of the form with tanh
  kGeluBias = 36,
  kGeluAux = 160,  // and what the gelu was taken of, to kAuxPointer
  kGeluAuxBias = 164,
  kGeluGradient = 192,  // of what lies at kAuxPointer, times the product
};

enum PreferenceAttribute : int {  // cublasLtMatmulPreferenceAttributes_t
  kWorkspaceBytes = 1,            // uint64_t
  kReductionSchemes = 3,          // uint32_t
  kAlignmentA = 5,                // uint32_t, bytes; B, C and D follow
};
constexpr uint32_t kReduceInFloat = 2;  // cublasLtReductionScheme_t: parts of a product in the compute type

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  size_t (*version)();
  const char* (*status_name)(Status);
  Status (*create)(Context**);
  Status (*description_create)(Description**, int compute, DataType scale);
  Status (*description_set)(Description*, Attribute, const void*, size_t);
  Status (*description_destroy)(Description*);
  Status (*layout_create)(Layout**, DataType, uint64_t rows, uint64_t columns, int64_t stride);  // by columns
  Status (*layout_destroy)(Layout*);
  Status (*preference_create)(Preference**);
  Status (*preference_set)(Preference*, PreferenceAttribute, const void*, size_t);
  Status (*preference_destroy)(Preference*);
  Status (*heuristic)(Context*, Description*, Layout* a, Layout* b, Layout* c, Layout* d, Preference*, int wanted,
                      Heuristic* found, int* count);
  // d = alpha a b + beta c, then the description's epilogue
  Status (*multiply)(Context*, Description*, const void* alpha, const void* a, Layout*, const void* b, Layout*,
                     const void* beta, const void* c, Layout*, void* d, Layout*, const Algorithm*, void* workspace,
                     size_t workspace_bytes, cudaStream_t);
};

// The library, looked for once; null where there is none that can be used, which `absent` says why.
const Library* cublaslt();
const std::string& absent();

}  // namespace lt
}  // namespace spu::cuda
