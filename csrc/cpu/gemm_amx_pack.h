// Packing for the tiles: panels of 32 rows, [step of 32 values along k][part][two tiles], zero padded. Included in the
// namespace of an instruction set.
//
// A bf16 value is its own only part. A finite fp16 value is the sum of two parts, x = hi + lo, exactly: hi is x rounded
// to bf16's 8 significand bits, and what is left of x's 11 has at most 3 bits and an exponent within fp16's range, of
// which bf16 has plenty. lo of an infinity or a NaN is NaN, which is how packing finds them.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/kernels.h"
#include "cpu/transpose.h"

namespace spu::SPU_ISA_NS {

constexpr int64_t kPanelRows = 2 * kTileRows;

template <class T>
constexpr int kParts = T::is_fp16 ? 2 : 1;
template <class T>
constexpr int64_t kStepValues = kParts<T> * 2 * kTileValues;  // of one panel

// Which of an operand's strides is 1: along k, across the panel's rows, or neither.
enum class Run { along, across, none };

// Up to n <= kLanes values, zeros after them; n may be negative.
template <class T>
SPU_INLINE vf load_upto_or_zero(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_some(p, n) : vf{};
}

// Two vectors of values to pairs of hi and of lo, the first vector's in the low halves. `left` adds up products of the
// lo: NaN if a value was not finite.
SPU_INLINE void split_pairs(vf x, vf y, vu (&out)[2], vf& left) {
  // Halves away from zero: lo makes good whichever way hi went.
  const vu hx = (O::bits(x) + 0x8000u) & 0xffff0000u, hy = (O::bits(y) + 0x8000u) & 0xffff0000u;
  const vf lx = x - O::from_bits(hx), ly = y - O::from_bits(hy);
  out[0] = hx >> 16 | hy;
  out[1] = O::bits(lx) >> 16 | (O::bits(ly) & 0xffff0000u);
  left = O::fma(lx, ly, left);  // of finite fp16 values at most 2^14 each time
}

template <class T>
SPU_INLINE void to_pairs(vf x, vf y, vu (&out)[kParts<T>], vf& left) {
  if constexpr (T::is_fp16) {
    split_pairs(x, y, out, left);
  } else {
    out[0] = O::bits(x) >> 16 | O::bits(y);
  }
}

// One row's 32 values along k as 16 pairs, `n` of them there. The pairs are neighbours for bf16, whose memory holds
// them so already, and values 16 apart for fp16, which so needs no shuffle.
template <class T>
SPU_INLINE void row_pairs(const T* p, int64_t n, vu (&out)[kParts<T>], vf& left) {
  if constexpr (T::is_fp16) {
    to_pairs<T>(load_upto_or_zero(p, n), load_upto_or_zero(p + kLanes, n - kLanes), out, left);
  } else {
    out[0] = vu{};
    if (n >= kTileDepth) {
      out[0] = load_raw<vu>(p);
    } else if (n > 0) {
      memcpy(&out[0], p, static_cast<size_t>(n) * sizeof(T));
    }
  }
}

// The memory that the next tile of the same rows (along), or the next panel (across), reads where this one reads its
// i-th row: transposing takes longer than the processor looks ahead, and rows apart are no stream that it foresees.
template <Run R, bool Apart, class T>
SPU_INLINE void ask_for_next(const T* p, int64_t stride, int64_t i) {
  if constexpr (R == Run::along) {
    __builtin_prefetch(p + i * stride + kTileDepth);
  } else {
    __builtin_prefetch(p + (Apart ? i : 2 * i) * stride + kPanelRows);
    __builtin_prefetch(p + (Apart ? i + kLanes : 2 * i + 1) * stride + kPanelRows);
  }
}

// 16 rows by 32 values along k, from p on, to a tile a part; `rows` and `depth` of them exist (all of them if Whole).
// Right: for the right operand, whose tile has pairs in rows. Apart: pairs are 16 apart along k. stride: between rows
// (along) or along k (across).
template <class T, Run R, bool Right, bool Apart, bool Whole>
SPU_INLINE void pack_tiles(uint16_t* out, const T* p, int64_t stride, int64_t rows, int64_t depth, vf& left) {
  static_assert(R == Run::across || Apart == T::is_fp16, "what lies along k has its pairs as row_pairs makes them");
  constexpr bool turn = Right == (R == Run::along);
  if (Whole) rows = kTileRows, depth = kTileDepth;
  vf kept[kParts<T>][kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    vu pair[kParts<T>];
    if constexpr (turn && Whole) ask_for_next<R, Apart>(p, stride, i);
    if constexpr (R == Run::along) {
      row_pairs<T>(p + i * stride, i < rows ? depth : 0, pair, left);
    } else {
      const int64_t one = Apart ? i : 2 * i, two = Apart ? i + kLanes : 2 * i + 1;
      to_pairs<T>(load_upto_or_zero(p + one * stride, one < depth ? rows : 0),
                  load_upto_or_zero(p + two * stride, two < depth ? rows : 0), pair, left);
    }
#pragma GCC unroll 2
    for (int s = 0; s < kParts<T>; ++s) {
      if constexpr (turn) {
        kept[s][i] = O::from_bits(pair[s]);
      } else {
        store_raw(out + s * 2 * kTileValues + i * kTileDepth, pair[s]);
      }
    }
  }
  if constexpr (turn) {
    for (int s = 0; s < kParts<T>; ++s) {
      transpose(kept[s]);
      memcpy(out + s * 2 * kTileValues, kept[s], sizeof kept[s]);
    }
  }
}

// A block without a run of its own, copied to one that lies along k.
template <class T>
static void gather(T (&out)[kTileRows][kTileDepth], const T* p, const cpu::Operand& x, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < least(rows, kTileRows); ++i) {
    for (int64_t k = 0; k < least(depth, kTileDepth); ++k) out[i][k] = p[i * x.row + k * x.col];
  }
}

// Steps of panels [begin, end) of one operand.
template <class T, Run R, bool Right, bool Apart = T::is_fp16>
static bool pack_run(uint16_t* out, int64_t panel_values, const cpu::Operand& x, int64_t r0, int64_t rows, int64_t k0,
                     int64_t depth, int64_t begin, int64_t end) {
  const int64_t steps = ceil_div(depth, kTileDepth), panels = end - begin, stride = R == Run::along ? x.row : x.col;
  vf left = {};
  for (int64_t i = 0; i < panels * steps; ++i) {
    // What lies across the rows is read a whole row of memory at a time, not 64 bytes of each page.
    const int64_t panel = begin + (R == Run::across ? i % panels : i / steps);
    const int64_t step = R == Run::across ? i / panels : i % steps;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t r = r0 + panel * kPanelRows + half * kTileRows, k = step * kTileDepth;
      const int64_t some = rows - r, deep = depth - k;
      const T* p = static_cast<const T*>(x.data) + r * x.row + (k0 + k) * x.col;
      uint16_t* o = out + panel * panel_values + step * kStepValues<T> + half * kTileValues;
      if constexpr (R == Run::none) {
        alignas(64) T block[kTileRows][kTileDepth] = {};
        gather<T>(block, p, x, some, deep);
        pack_tiles<T, Run::along, Right, Apart, true>(o, block[0], kTileDepth, kTileRows, kTileDepth, left);
      } else if (some >= kTileRows && deep >= kTileDepth) {
        pack_tiles<T, R, Right, Apart, true>(o, p, stride, some, deep, left);
      } else {
        pack_tiles<T, R, Right, Apart, false>(o, p, stride, some, deep, left);
      }
    }
  }
  return any(left != left);
}

// Packs values [k0, k0 + depth) along k of panels [begin, end), which lie panel_values apart and begin at row r0 of an
// operand with `rows` rows. True if an fp16 value is not finite. For the right operand the "rows" are the product's
// columns: pass its strides exchanged.
template <class T, bool Right>
static bool pack_steps(uint16_t* out, int64_t panel_values, const cpu::Operand& x, int64_t r0, int64_t rows, int64_t k0,
                       int64_t depth, int64_t begin, int64_t end) {
  const auto body = x.col == 1   ? pack_run<T, Run::along, Right>
                    : x.row == 1 ? pack_run<T, Run::across, Right>
                                 : pack_run<T, Run::none, Right>;
  return body(out, panel_values, x, r0, rows, k0, depth, begin, end);
}

}  // namespace spu::SPU_ISA_NS
