// The kernels of one instruction set: a table of functions on raw pointers. No torch header and no standard library
// container is visible to the files compiled with wider instructions, see math/hd.h.
#pragma once

#include <stdint.h>

#include "math/activation.h"
#include "math/adamw.h"
#include "math/masters.h"
#include "math/moments.h"
#include "math/types.h"
#include "math/wire.h"

namespace spu::cpu {

// [0, count), to be divided among `parts` threads, in pieces of at least so many.
struct Shares {
  int64_t count, parts, least = 1;
};

// Runs body(context, begin, end) over pieces of it on the calling thread's torch threads, which take one after another;
// on those of waiting stages too, if the parts are more than its own.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
void parallel(const Shares& shares, RangeBody body, void* context);
int64_t threads();

// Scratch memory of the calling thread, 64-byte aligned, at least `floats` long, kept for the next call (up to a
// bound). Slots are independent buffers.
constexpr int kSharedA = 0, kLocalB = 1, kLocalC = 2, kSharedC = 3, kSlots = 4;
float* workspace(int slot, int64_t floats);
// How often the thread has asked for a slot: what it wrote there is still there as long as this stands.
int64_t workspace_uses(int slot);

// A hint before the first write to `bytes` of new memory at data; worth a system call from kLargeBytes on.
constexpr int64_t kLargeBytes = int64_t{1} << 22;
void advise_large_pages(void* data, int64_t bytes);

// A matrix operand: element (i, j) of the product's A or B lies at data[i * row + j * col].
struct Operand {
  const void* data;
  Type type;
  int64_t row, col;
};

// C [m, n] = A [m, k] B [k, n]. With b2 alone a twin C2 = A B2 is made beside C; with a2 and b2 the second product,
// of the same sizes, is added to the first: C = A B + A2 B2. The epilogue's matrices hold C at (c_row, c_column), a
// multiple of kStatColumns, in rows of c_length; 0: of n.
struct Product {
  int64_t m, n, k;
  Operand a, b;
  const Operand *a2, *b2;
  int64_t c_row = 0, c_column = 0, c_length = 0;
  // The number, on this thread, of the call all of whose products have this A, or B; 0: none. What it was packed to for
  // one of them may serve the others.
  int64_t shared_a = 0, shared_b = 0;
};

// Among how many threads a product (k > 0) is to be divided: from `least` multiply-adds on, those of the calling
// thread; from `shared` on those besides that wait and can help (cpu/help.h).
int64_t threads_for(const Product& p, int64_t least, int64_t shared);

// Softmax statistics are kept per group of this many columns, whatever the threads are.
constexpr int64_t kStatColumns = 256;

// What happens to an fp32 accumulator block of C.
struct Epilogue {
  enum Kind {
    store,             // out = act(acc + bias) in out_type, z = acc + bias into preact; with an addend, of out_type,
                       // out = addend + (acc + bias, rounded to sum_type)
    main_grad_add,     // main_grad (+)= inv_scale * acc, and *nonfinite = 1 if some acc is infinite or NaN
    gated,             // out = act(acc) * twin; preact = acc and up = twin, unless null
    softmax_stats,     // per row and group of columns the maximum and the sum of exp(acc - maximum); the target's acc
    softmax_grad,      // out = (exp(acc - lse) - onehot(target)) * grad
    derivative,        // out = acc * act'(saved); acted = act(saved) unless null; column_sums += out as it was rounded
    gated_derivative,  // out = acc * saved_up * act'(saved), up = acc * act(saved), acted = act(saved) * saved_up
  };
  Kind kind;

  // Matrices have the product's c_length as leading dimension.
  const void* bias;  // [n] or null
  void* out;
  void* preact;  // or null
  void* up;      // or null
  Type out_type;
  math::Act act;
  const void* addend;  // or null; then without an activation and preact
  Type sum_type;

  float* main_grad;
  float inv_scale;
  bool accumulate;
  int32_t* nonfinite;  // shared by the threads of this call, written atomically

  const int64_t* target;  // [m], the column of each row's target; none if outside [0, n)
  float* stats;           // [groups, m, 2]: maximum and sum
  float* target_value;    // [m]
  const float* lse;       // [m]
  const float* grad;      // [m]
  int64_t rows;           // m
  int64_t ignore_index;   // rows with this target have no gradient, whatever their grad is

  const void* saved;  // of out_type, as is acted: the pre-activation, or relu's result
  const void* saved_up;
  void* acted;         // or null
  float* column_sums;  // [n], zero at first, or null; one task has all rows of a column, so that their order is fixed
};

// Pointers of gated_backward, all of one storage type and length.
struct GatedBackward {
  const void *dh, *gate, *up;
  void *dgate, *dup, *h;
};

// A tensor [batch, tokens, heads, head_dim], its last dimension contiguous; strides in elements.
struct HeadsView {
  const void* data;
  int64_t batch, token, head;
};

// Attention without a mask, or with the causal one. Results are contiguous [batch, tokens, heads, head_dim].
struct Attention {
  Type type;
  int64_t queries, keys, heads, kv_heads, head_dim;
  float scale;
  bool causal;  // queries == keys then
  HeadsView q, k, v;
  void* out;
  float* lse;  // [batch, heads, queries]: log of the sum of exp(scale * q k)
  // backward
  HeadsView dout, saved_out;
  void *dq, *dk, *dv;
  int64_t query_chunks;  // forward: tasks that share a head's queries
};

// RMSNorm, or LayerNorm, of rows [rows, cols]; matrices are contiguous, weight and bias [cols] of the same type or
// fp32. Pointers that a direction does not use are null.
struct Norm {
  Type type, weight_type;
  Type y_type;          // of y or dy: type, or, where that is fp32 and no LayerNorm is asked for, a 16-bit one
  bool layer, rounded;  // rounded: the normalised row is rounded to the type before the weight multiplies it
  int64_t rows, cols;
  float eps, offset;  // the weight's offset
  const void *x, *weight, *bias, *residual;
  void *y, *sum;       // sum = x + residual, normalised in place of x
  float *mean, *rstd;  // [rows]
  // backward: dw and db [blocks, cols], a row for each block_rows rows of x
  const void *dy, *dsum;
  void* dx;
  float *dw, *db;
  int64_t block_rows;
};

// Rotary positions for queries and keys [batch, tokens, heads, head_dim] of any strides but the last; cos and sin
// [batch or 1, tokens, head_dim] contiguous, of the same type or fp32.
struct Rotary {
  Type type, angles;
  bool interleaved, inverse;
  int64_t tokens, head_dim, cos_batch;  // cos_batch: the stride from one batch to the next, 0 for one that all share
  HeadsView in[2], out[2];
  int64_t heads[2];
  const void *cos, *sin;
};

// Rows of logits [rows, cols] become exponentials; dz [rows, cols], which may be the same memory, is
// (softmax - onehot(target)) * grad, rounded to the type; rows whose target is ignore_index have no loss and no
// gradient.
struct CrossEntropy {
  Type type;
  int64_t cols;
  float* logits;
  void* dz;
  const int64_t* target;  // each in [0, cols) or ignore_index
  const float* grad;
  float* losses;
  int64_t ignore_index;
};

// A parameter with what its update needs beside; seed is that of the step's noise.
struct AdamWRange : math::AdamWItem {
  Type param_type, grad_type;
  math::Moments moments;
  math::Master kept;
  float grad_scale;
  uint32_t seed;
};

struct KernelTable {
  // k = 0 gives zero accumulators.
  void (*gemm)(const Product& p, const Epilogue& e);
  // The epilogue (those without sums over rows) of rows [begin, end) on their fp32 sums c [end - begin, n], and the
  // twin's c2.
  void (*finish)(const Epilogue& e, const float* c, const float* c2, int64_t n, int64_t begin, int64_t end);

  // Tasks [begin, end) of batch x heads x query_chunks, and of batch x kv_heads.
  void (*attention)(const Attention& a, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention& a, int64_t begin, int64_t end);

  // dz[i] = dy[i] * act'(saved[i])
  void (*act_backward)(Type type, math::Act act, const void* dy, const void* saved, void* dz, int64_t begin,
                       int64_t end);
  // dgate = dh * up * act'(gate), dup = dh * act(gate), h = act(gate) * up
  void (*gated_backward)(Type type, math::Act act, const GatedBackward& g, int64_t begin, int64_t end);
  // out[j] = sum over rows of a [rows, cols] row-major matrix, columns [begin, end), fp32
  void (*column_sums)(Type type, const void* data, int64_t rows, int64_t cols, int64_t begin, int64_t end, float* out);
  // Rows [begin, end), and blocks [begin, end) of rows.
  void (*norm)(const Norm& n, int64_t begin, int64_t end);
  void (*norm_backward)(const Norm& n, int64_t begin, int64_t end);
  // out [cols] (+)= inv_scale * the sum of the rows named, in their order; true if a sum is not finite
  bool (*sum_rows)(Type type, const void* rows, int64_t cols, const uint32_t* which, int64_t count, float* out,
                   float inv_scale, bool accumulate);
  // Tokens [begin, end) of batch x tokens.
  void (*rotary)(const Rotary& r, int64_t begin, int64_t end);
  // main_grad (+)= inv_scale * grad; true if a value of grad is not finite
  bool (*unscale)(Type type, const void* grad, float* main_grad, float inv_scale, bool accumulate, int64_t begin,
                  int64_t end);
  // dst = src converted
  void (*convert)(Type from, const void* src, Type to, void* dst, int64_t begin, int64_t end);

  // Blocks [begin, end) of 64 values of x [numel].
  void (*int8_encode)(Type type, const void* x, int64_t numel, float* scales, int8_t* codes, int64_t begin,
                      int64_t end);
  void (*int8_decode)(Type type, void* x, int64_t numel, const float* scales, const int8_t* codes, int64_t begin,
                      int64_t end);
  // The same for int4 (blocks of 32 values, 16 bytes) and fp8.
  void (*small_encode)(wire::Codec codec, Type type, const void* x, int64_t numel, float* scales, uint8_t* codes,
                       int64_t begin, int64_t end);
  void (*small_decode)(wire::Codec codec, Type type, void* x, int64_t numel, const float* scales, const uint8_t* codes,
                       int64_t begin, int64_t end);

  // Blocks [begin, end) of math::kMomentBlock values.
  void (*adamw)(const AdamWRange& tensor, const math::AdamWStep& step, int64_t begin, int64_t end);
  double (*square_sum)(const float* x, int64_t begin, int64_t end);
  // out = x + y
  void (*add)(const float* x, const float* y, float* out, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*cross_entropy)(const CrossEntropy& c, int64_t begin, int64_t end);
  const char* name;
};

const KernelTable& kernels();                       // the one chosen for this machine, once
const KernelTable* kernels_named(const char* isa);  // null if they do not run here

// The least product that AMX tiles take, by the operands' type; what is smaller in one dimension is the AVX-512
// kernel's. fp32 never is the tiles'. May be set while products run.
struct TileRule {
  int64_t rows, columns, depth;
};
TileRule tile_rule(Type type);
void set_tile_rule(Type type, const TileRule& rule);

// Defined where compiled.
const KernelTable& generic_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512bf16_kernels();
const KernelTable& amx_kernels();

}  // namespace spu::cpu
