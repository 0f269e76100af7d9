// Which kernels multiply: those of the chosen instruction set, of a narrower one, or torch's own product with our
// epilogue, by a table of ways. Python fills it from measurements (spu/ops/cpu_table.py).
#pragma once

#include "cpu/kernels.h"

namespace spu::cpu {

enum class ProductOp { linear, linear_dx, linear_dw, gated_linear, gated_dx, linear_ce };

// What gemm does, by the way that the table names for the op, the operands' type and the product's class:
// row (m <= 4), skinny (m <= 64), few (m or k <= 128), small (m n k <= 2^27), deep (k > 2048) or large.
void multiply(ProductOp op, const Product& p, const Epilogue& e);

// A number for a call of several products, on its thread: Product's shared_a or shared_b.
int64_t next_call();

// The table's words. A way is "" (the chosen kernels), an instruction set's name, or "torch": the sums by torch's fp32
// product, 16-bit operands widened before it, whose accumulation is as exact as ours; not for linear_ce, and for row
// only of linear_dx (the dot products of the others need no packing). False for a word that is unknown, and for a way
// that does not serve here.
bool set_way(const char* op, const char* type, const char* shape_class, const char* way);
// The way in use for a product; null for an unknown op or type.
const char* way_of(const char* op, const char* type, int64_t m, int64_t n, int64_t k);

}  // namespace spu::cpu
