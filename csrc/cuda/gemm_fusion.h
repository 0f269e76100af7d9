// Shared by the CUTLASS epilogues of both generations: element functions over fragments, and the found_inf flag.
#pragma once

#define CUTLASS_SKIP_REDUCTION_INIT 1  // or each launch would reset found_inf
#include <cutlass/array.h>
#include <cutlass/bfloat16.h>
#include <cutlass/cutlass.h>
#include <cutlass/functional.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/gemm.h"
#include "math/activation.h"

namespace spu::cuda {
namespace fusion {

constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

template <Type T>
struct ElementOf;
template <>
struct ElementOf<Type::fp16> {
  using type = cutlass::half_t;
};
template <>
struct ElementOf<Type::bf16> {
  using type = cutlass::bfloat16_t;
};

CUTLASS_HOST_DEVICE float activate_any(int act, float z) {
  switch (static_cast<math::Act>(act)) {
    case math::Act::relu:
      return math::activate<math::Act::relu, float>(z);
    case math::Act::gelu:
      return math::activate<math::Act::gelu, float>(z);
    case math::Act::gelu_tanh:
      return math::activate<math::Act::gelu_tanh, float>(z);
    case math::Act::silu:
      return math::activate<math::Act::silu, float>(z);
    default:
      return z;
  }
}

// act(z), or act(gate) * z: activation and choice arrive as one broadcast number, so that one kernel serves all of
// them. The gate may hold anything where it is not wanted.
constexpr float kGated = 8.0f;  // added to the activation's number

template <class Fragment>
struct Activate {
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& choice, const Fragment& gate, const Fragment& z) const {
    Fragment y;
    const bool gated = choice[0] >= kGated;
    const int act = static_cast<int>(gated ? choice[0] - kGated : choice[0]);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) {
      const float a = activate_any(act, gated ? gate[i] : z[i]);
      y[i] = gated ? a * z[i] : a;
    }
    return y;
  }
};

inline float choice_of(const Gemm& g) {
  return static_cast<float>(g.act) + (g.gate != nullptr ? kGated : 0.0f);
}

// wanted ? source + value : value. A choice, not a product with 0: the source may hold anything then.
template <class Fragment>
struct AddIf {
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& wanted, const Fragment& source, const Fragment& value) const {
    Fragment sum;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) sum[i] = wanted[0] != 0.0f ? source[i] + value[i] : value[i];
    return sum;
  }
};

// Folds values into a flag that is 0, or infinity after the first one that is not finite. So flags fold like values.
template <class T>
struct AnyNonFinite {
  CUTLASS_HOST_DEVICE T operator()(T flag, T value) const {
    const bool bad = math::is_nonfinite<float>(flag) || math::is_nonfinite<float>(value);
    return bad ? math::Ops<float>::from_bits(0x7f800000u) : T(0);
  }
};

// found_inf := 1 if the folded flag says so. Every writer stores the same value, so a plain store does.
template <class T>
struct RaiseFlag {
  CUTLASS_DEVICE void operator()(T* found_inf, const T& flag) const {
    if (found_inf != nullptr && flag != T(0)) *static_cast<volatile T*>(found_inf) = T(1);
  }
};

}  // namespace fusion
}  // namespace spu::cuda

namespace cutlass {
template <class T>
struct is_atomic<spu::cuda::fusion::RaiseFlag<T>> : platform::true_type {};
}  // namespace cutlass
