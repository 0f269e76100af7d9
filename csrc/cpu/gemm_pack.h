// Packing: an operand of any strides and storage type becomes panels, W rows by kc slots, slot-major, zero padded. A
// slot is an fp32 value, or two bf16 values (see gemm_micro.h). Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// Floats from one panel to the next. A panel narrower than a vector is stored with whole vectors whose excess the
// next row overwrites; the slack takes the last one's.
template <int W>
constexpr int64_t panel_stride(int64_t kc) {
  constexpr int64_t slack = W % kLanes == 0 ? 0 : kLanes;
  return (W * kc + slack + 15) / 16 * 16;
}

// A panel's source: element (r, k) at p[r * row + k * col]; `rows` of its W rows exist, and `reach` >= rows of the
// matrix's rows lie from the panel's first row on (what may be read).
template <class T>
struct PanelSource {
  const T* p;
  int64_t row, col;
  int64_t rows, reach;
};

// Contiguous along k: blocks of kLanes x kLanes are transposed in registers. Starts at value `from`.
template <int W, class T>
static void pack_transposed(float* out, const PanelSource<T>& s, int64_t from, int64_t kc) {
  for (int64_t k = from; k < kc; k += kLanes) {
    const int64_t ks = kc - k < kLanes ? kc - k : kLanes;
#pragma GCC unroll 4
    for (int g = 0; g < W; g += kLanes) {
      constexpr int most = W < kLanes ? W : kLanes;
      const T* p = s.p + g * s.row + k;
      vf r[kLanes];
      if (s.rows - g >= most && ks == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = i < most ? load(p + i * s.row) : vf{};
      } else {
        for (int i = 0; i < kLanes; ++i) r[i] = i < s.rows - g ? load_some(p + i * s.row, ks) : vf{};
      }
      transpose(r);
      float* o = out + k * W + g;
      if (ks == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(o + i * W, r[i]);
      } else {
        for (int i = 0; i < ks; ++i) store(o + i * W, r[i]);
      }
    }
  }
}

#if defined(SPU_SHUFFLE_HALVES)
// Asks for the lines of the next panel's rows that begin at k: the rows of a panel are more streams than a core follows
// by itself. (A forward of 512 rows that are not in L2: 1% faster.)
template <int W, class T>
SPU_INLINE void prefetch_next_panel(const PanelSource<T>& s, int64_t k) {
  if (k % (64 / static_cast<int64_t>(sizeof(T))) != 0 || s.reach < 2 * W) return;
#pragma GCC unroll 32
  for (int i = 0; i < W; ++i) __builtin_prefetch(s.p + (W + i) * s.row + k, 0, 2);
}

// 16-bit values contiguous along k, all W rows there: transposed before they are widened, which halves the shuffles.
// A vector holds 16 rows' values of one k in two halves of 8. Returns how many values of k were packed.
template <int W, class T>
static int64_t pack_transposed_halves(float* out, const PanelSource<T>& s, int64_t kc) {
  int64_t k = 0;
  if constexpr (W % 16 == 0) {
    for (; k + 8 <= kc; k += 8) {
      prefetch_next_panel<W>(s, k);
#pragma GCC unroll 2
      for (int g = 0; g < W; g += 16) {
        vh16 r[8];
        const T* p = s.p + g * s.row + k;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) r[i] = join_halves(p + i * s.row, p + (i + 8) * s.row);
        transpose_halves(r);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) store_widened<T>(out + (k + i) * W + g, r[i]);
      }
    }
  } else if constexpr (W < 8 && kLanes == 8) {
    // 8 rows by two runs of 8 along k
    for (; k + 16 <= kc; k += 16) {
      vh16 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = i < W ? load_raw<vh16>(s.p + i * s.row + k) : vh16{};
      transpose_halves(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (k + i) * W, widen_eight<T, 0>(r[i]));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (k + 8 + i) * W, widen_eight<T, 1>(r[i]));
    }
  } else if constexpr (W < 16 && kLanes == 16) {
    for (; k + 8 <= kc; k += 8) {
      prefetch_next_panel<W>(s, k);
      vh16 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const T* p = s.p + i * s.row + k;
        r[i] = i + 8 < W ? join_halves(p, p + 8 * s.row) : join_halves(p, static_cast<const T*>(nullptr));
      }
      transpose_halves(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) store_widened<T>(out + (k + i) * W, r[i]);
    }
  }
  return k;
}
#endif

// Contiguous along the panel's rows: whole vectors are widened and stored.
template <int W, class T>
static void pack_direct(float* out, const PanelSource<T>& s, int64_t kc) {
  constexpr int groups = (W + kLanes - 1) / kLanes;
  if (s.reach >= groups * kLanes) {
    const T* p = s.p;
    for (int64_t k = 0; k < kc; ++k, p += s.col, out += W) {
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) store(out + g * kLanes, load(p + g * kLanes));
    }
    return;
  }
  for (int64_t k = 0; k < kc; ++k) {
    for (int g = 0; g < groups; ++g) {
      const int64_t n = s.rows - g * kLanes;
      const T* p = s.p + k * s.col + g * kLanes;
      store(out + k * W + g * kLanes, n >= kLanes ? load(p) : n > 0 ? load_some(p, n) : vf{});
    }
  }
}

template <int W, class T>
static void pack_strided(float* out, const PanelSource<T>& s, int64_t kc) {
  for (int64_t k = 0; k < kc; ++k) {
    for (int g = 0; g < W; g += kLanes) {
      T tmp[kLanes];
      memset(tmp, 0, sizeof tmp);
      for (int i = 0; i < kLanes && g + i < s.rows; ++i) tmp[i] = s.p[(g + i) * s.row + k * s.col];
      store(out + k * W + g, load(tmp));
    }
  }
}

template <int W, class T>
static void pack_panel(float* out, const PanelSource<T>& s, int64_t kc) {
  if (s.col == 1) {
    int64_t packed = 0;
#if defined(SPU_SHUFFLE_HALVES)
    if constexpr (sizeof(T) == 2) {
      if (s.rows == W) packed = pack_transposed_halves<W, T>(out, s, kc);
    }
#endif
    if (packed < kc) pack_transposed<W, T>(out, s, packed, kc);
  } else if (s.row == 1) {
    pack_direct<W, T>(out, s, kc);
  } else {
    pack_strided<W, T>(out, s, kc);
  }
}

// Two bf16 values in a lane: one k in the low halves, the next in the high ones.
SPU_INLINE vf pair_of(vu low, vu high) {
  return (vf)(low | (high << 16));
}

// Pairs of bf16 contiguous along k are 4-byte patterns already: transposed like fp32.
template <int W>
static void pack_pairs_transposed(float* out, const PanelSource<Bf16>& s, int64_t kc) {
  for (int64_t k = 0; k < kc; k += 2 * kLanes) {
    const int64_t values = kc - k < 2 * kLanes ? kc - k : 2 * kLanes, slots = (values + 1) / 2;
    for (int g = 0; g < W; g += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = vf{};
        const Bf16* p = s.p + (g + i) * s.row + k;
        if (i >= s.rows - g || i >= W - g) continue;
        if (values == 2 * kLanes) {
          r[i] = load_raw<vf>(p);
        } else {
          memcpy(&r[i], p, static_cast<size_t>(2 * values));
        }
      }
      transpose(r);
      float* o = out + k / 2 * W + g;
      for (int i = 0; i < slots; ++i) store(o + i * W, r[i]);
    }
  }
}

SPU_INLINE vu halves_of(const Bf16* p, int64_t n) {
  return O::bits(n >= kLanes ? load(p) : n > 0 ? load_some(p, n) : vf{}) >> 16;
}

template <int W>
static void pack_pairs_direct(float* out, const PanelSource<Bf16>& s, int64_t kc) {
  const bool whole = s.reach >= (W + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < kc; k += 2) {
#pragma GCC unroll 4
    for (int g = 0; g < W; g += kLanes) {
      const Bf16 *p = s.p + k * s.col + g, *next = p + s.col;
      const int64_t n = whole ? kLanes : s.rows - g;
      const vu low = halves_of(p, n), high = k + 1 < kc ? halves_of(next, n) : vu{};
      store(out + k / 2 * W + g, pair_of(low, high));
    }
  }
}

template <int W>
static void pack_pairs_strided(float* out, const PanelSource<Bf16>& s, int64_t kc) {
  for (int64_t k = 0; k < kc; k += 2) {
    for (int g = 0; g < W; g += kLanes) {
      vu slot = {};
      for (int i = 0; i < kLanes && g + i < s.rows; ++i) {
        const Bf16* p = s.p + (g + i) * s.row + k * s.col;
        slot[i] = p[0].u | (k + 1 < kc ? static_cast<uint32_t>(p[s.col].u) << 16 : 0u);
      }
      store(out + k / 2 * W + g, (vf)slot);
    }
  }
}

// Packs panel rows [r0, r0 + W) and values [k0, k0 + kc) along k of an operand with `rows` rows. For B the "rows" are
// the product's columns: pass its strides exchanged.
template <int W, bool Pairs>
static void pack(float* out, const cpu::Operand& x, int64_t r0, int64_t rows, int64_t k0, int64_t kc) {
  const int64_t reach = rows - r0, valid = reach < W ? reach : W, at = r0 * x.row + k0 * x.col;
  if constexpr (Pairs) {
    const PanelSource<Bf16> s = {static_cast<const Bf16*>(x.data) + at, x.row, x.col, valid, reach};
    if (s.col == 1) return pack_pairs_transposed<W>(out, s, kc);
    if (s.row == 1) return pack_pairs_direct<W>(out, s, kc);
    return pack_pairs_strided<W>(out, s, kc);
  } else if (x.type == Type::fp16) {
    pack_panel<W, Fp16>(out, {static_cast<const Fp16*>(x.data) + at, x.row, x.col, valid, reach}, kc);
  } else if (x.type == Type::bf16) {
    pack_panel<W, Bf16>(out, {static_cast<const Bf16*>(x.data) + at, x.row, x.col, valid, reach}, kc);
  } else {
    pack_panel<W, float>(out, {static_cast<const float*>(x.data) + at, x.row, x.col, valid, reach}, kc);
  }
}

}  // namespace spu::SPU_ISA_NS
