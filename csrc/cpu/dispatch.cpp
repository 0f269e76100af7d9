// Which kernels run here: the widest instructions that the CPU and the operating system offer, or a narrower set
// named by SPU_CPU_ISA (scalar, avx2, avx512, avx512bf16, amx).
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if !defined(SPU_X86)
#if defined(__x86_64__)
#define SPU_X86 1
#else
#define SPU_X86 0
#endif
#endif
// Whether kernels_amx.cpp is in this build: its compiler may not have known the instructions.
#if !defined(SPU_AMX)
#define SPU_AMX SPU_X86
#endif

namespace spu::cpu {
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

// Why the tiles of AMX cannot be used, or null. They are 8 KB of registers: the system must be able to save them, and
// Linux gives them to a process that asks (all its threads, and those to come).
const char* lacks_amx() {
#if SPU_AMX && SPU_X86 && defined(__linux__)
  unsigned a, b, c, d;
  const bool cpu = has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  if (!cpu) return "this CPU lacks AMX-TILE or AMX-BF16";
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));  // what the system saves; AVX-512 implies that it can be asked
  if ((a >> 17 & 3) != 3) return "the operating system does not save the tiles of AMX";
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request, tile_data) != 0) {
    return "the kernel did not permit the tiles of AMX (arch_prctl(ARCH_REQ_XCOMP_PERM); Linux has it from 5.16 on)";
  }
  return nullptr;
#elif SPU_X86 && defined(__linux__)
  return "spu was built by a compiler that does not know -mamx-tile and -mamx-bf16 (g++ 11 and clang 12 do)";
#else
  return "AMX needs Linux on x86-64";
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
  if (asked == "amx") {
    if (const char* why = lacks_amx()) cannot(asked, why);
#if SPU_AMX
    return amx_kernels();
#endif
  }
  if (!asked.empty()) {
    cannot(asked, "known here are scalar, avx2, avx512, avx512bf16 and amx (all but the first on x86-64)");
  }
#if SPU_AMX
  if (!lacks_amx()) return amx_kernels();
#endif
#if SPU_X86
  if (has_avx512bf16()) return avx512bf16_kernels();
  if (has_avx512()) return avx512_kernels();
  if (has_avx2()) return avx2_kernels();
#endif
  return generic_kernels();
}
#else
// A test's build: all of AVX-512's kernels and the pairs of bf16 besides; or the tiles, and those beneath.
const KernelTable& choose() {
  const char* variable = std::getenv("SPU_CPU_ISA");
  return variable && std::string(variable) == "amx" ? amx_kernels() : avx512bf16_kernels();
}
#endif

// By Type: from where on the tiles were ahead of AVX-512 (docs/cpu_kernels.md). An emulated build gives the tiles
// whatever it can.
#if defined(SPU_EMULATE_AVX512)
TileRule rules[] = {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}};
#else
TileRule rules[] = {{16, 1, 16}, {4, 1, 16}, {1, 1, 1}};
#endif

}  // namespace

TileRule tile_rule(Type type) {
  const TileRule& rule = rules[static_cast<int>(type)];
  return {__atomic_load_n(&rule.rows, __ATOMIC_RELAXED), __atomic_load_n(&rule.columns, __ATOMIC_RELAXED),
          __atomic_load_n(&rule.depth, __ATOMIC_RELAXED)};
}

void set_tile_rule(Type type, const TileRule& rule) {
  TileRule& kept = rules[static_cast<int>(type)];
  __atomic_store_n(&kept.rows, rule.rows, __ATOMIC_RELAXED);
  __atomic_store_n(&kept.columns, rule.columns, __ATOMIC_RELAXED);
  __atomic_store_n(&kept.depth, rule.depth, __ATOMIC_RELAXED);
}

const KernelTable* kernels_named(const char* isa) {
  const std::string name = isa;
  if (name == kernels().name) return &kernels();
#if SPU_X86 && !defined(SPU_EMULATE_AVX512)
  if (name == "avx512bf16" && has_avx512bf16()) return &avx512bf16_kernels();
  if (name == "avx512" && has_avx512()) return &avx512_kernels();
  if (name == "avx2" && has_avx2()) return &avx2_kernels();
#endif
  return nullptr;
}

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace spu::cpu
