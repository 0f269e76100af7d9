// The input of an epilogue, and how it walks over it. Included in the namespace of an instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// A block of C: rows x cols accumulators at c with leading dimension ldc, whose corner is (row, col) of C [m, n]; the
// twin's accumulators at c2, where there is one.
struct Tile {
  const float *c, *c2;
  int64_t ldc, row, col, rows, cols, n;
};

SPU_INLINE int64_t row_length(const cpu::Product& p) {
  return p.c_length ? p.c_length : p.n;
}

using TileEpilogue = void (*)(const cpu::Epilogue& e, const Tile& t);

// Calls body(j, left) for the vectors of a row; left < kLanes marks a last, partial one.
template <class Body>
SPU_INLINE void for_vectors(int64_t cols, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) body(j, int64_t{kLanes});
  if (j < cols) body(j, cols - j);
}

// Some vectors, of a row's same columns.
template <int N>
struct Results {
  vf of[N];
};

template <class T>
SPU_INLINE vf load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, n);
}
template <class T>
SPU_INLINE void store_upto(T* p, vf v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_some(p, v, n);
  }
}

// Rows out[0 .. N) of `cols` values, or null, from what body(j, left) returns for their vectors: Results<N>.
template <int N, class T, class Body>
SPU_INLINE void store_row(T* const (&out)[N], int64_t cols, Body body) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes) {
    const Results<N> a = body(j, int64_t{kLanes}), b = body(j + kLanes, int64_t{kLanes});
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if (out[i]) store_pair(out[i] + j, a.of[i], b.of[i]);
    }
  }
  for (; j < cols; j += kLanes) {
    const Results<N> last = body(j, least(cols - j, kLanes));
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if (out[i]) store_upto(out[i] + j, last.of[i], cols - j);
    }
  }
}

}  // namespace spu::SPU_ISA_NS
