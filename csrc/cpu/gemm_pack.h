// Packing: an operand of any strides and storage type becomes fp32 panels, W rows by kc, k-major, zero padded.
// Included by kernels.inl.h in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu {
namespace SPU_ISA_NS {

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

// Contiguous along k: blocks of kLanes x kLanes are transposed in registers.
template <int W, class T>
static void pack_transposed(float* out, const PanelSource<T>& s, int64_t kc) {
  for (int64_t k = 0; k < kc; k += kLanes) {
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

// Contiguous along the panel's rows: whole vectors are widened and stored.
template <int W, class T>
static void pack_direct(float* out, const PanelSource<T>& s, int64_t kc) {
  constexpr int groups = (W + kLanes - 1) / kLanes;
  if (s.reach >= groups * kLanes) {
    for (int64_t k = 0; k < kc; ++k) {
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) store(out + k * W + g * kLanes, load(s.p + k * s.col + g * kLanes));
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
    pack_transposed<W, T>(out, s, kc);
  } else if (s.row == 1) {
    pack_direct<W, T>(out, s, kc);
  } else {
    pack_strided<W, T>(out, s, kc);
  }
}

// Packs panel rows [r0, r0 + W) and columns [k0, k0 + kc) of an operand with `rows` rows. For B the "rows" are the
// product's columns: pass its strides exchanged.
template <int W>
static void pack(float* out, cpu::Type type, const void* data, int64_t row, int64_t col, int64_t r0, int64_t rows,
                 int64_t k0, int64_t kc) {
  const int64_t reach = rows - r0, valid = reach < W ? reach : W, at = r0 * row + k0 * col;
  if (type == cpu::Type::fp16) {
    pack_panel<W, Fp16>(out, {static_cast<const Fp16*>(data) + at, row, col, valid, reach}, kc);
  } else if (type == cpu::Type::bf16) {
    pack_panel<W, Bf16>(out, {static_cast<const Bf16*>(data) + at, row, col, valid, reach}, kc);
  } else {
    pack_panel<W, float>(out, {static_cast<const float*>(data) + at, row, col, valid, reach}, kc);
  }
}

}  // namespace SPU_ISA_NS
}  // namespace spu
