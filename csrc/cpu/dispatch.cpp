// Which kernels run here: the widest instructions that the CPU and the operating system offer, or a narrower set
// named by SPU_CPU_ISA (scalar, avx2, avx512, avx512bf16).
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if !defined(SPU_X86)
#if defined(__x86_64__)
#define SPU_X86 1
#else
#define SPU_X86 0
#endif
#endif

namespace spu {
namespace cpu {
namespace {

#if !defined(SPU_EMULATE_AVX512)
#if SPU_X86
// Bit 29 of leaf 1's ecx. Older compilers' __builtin_cpu_supports does not know the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

bool has_avx2() {
#if SPU_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#else
  return false;
#endif
}

bool has_avx512() {
#if SPU_X86
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool has_avx512bf16() {
#if SPU_X86
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

[[noreturn]] void cannot(const std::string& asked, const char* why) {
  throw std::invalid_argument("SPU_CPU_ISA=" + asked + ": " + why + "; unset it to let spu choose");
}

const KernelTable& choose() {
  const char* variable = std::getenv("SPU_CPU_ISA");
  const std::string asked = variable ? variable : "";
  if (asked == "scalar") return generic_kernels();
#if SPU_X86
  if (asked == "avx2") {
    if (!has_avx2()) cannot(asked, "this CPU lacks AVX2, FMA or F16C");
    return avx2_kernels();
  }
  if (asked == "avx512") {
    if (!has_avx512()) cannot(asked, "this CPU lacks AVX-512 F, BW, VL or DQ");
    return avx512_kernels();
  }
  if (asked == "avx512bf16") {
    if (!has_avx512bf16()) cannot(asked, "this CPU lacks AVX512_BF16");
    return avx512bf16_kernels();
  }
#endif
  if (!asked.empty()) cannot(asked, "known here are scalar, avx2, avx512 and avx512bf16 (all but the first on x86-64)");
#if SPU_X86
  if (has_avx512bf16()) return avx512bf16_kernels();
  if (has_avx512()) return avx512_kernels();
  if (has_avx2()) return avx2_kernels();
#endif
  return generic_kernels();
}
#else
const KernelTable& choose() {
  return avx512bf16_kernels();
}  // a test's build, which has no others: all of AVX-512's kernels, and the pairs of bf16 besides
#endif

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace cpu
}  // namespace spu
