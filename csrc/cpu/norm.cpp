// spu::rms_norm, spu::layer_norm and their backwards: the torch side. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include <algorithm>

#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

// Sums over rows are made for blocks of rows, whatever the threads are, and added up in their order.
constexpr int64_t kMostBlocks = 64, kLeastRows = 16;

struct Size {
  int64_t rows, cols;
};

Size size_of(const char* op, const Tensor& x) {
  checks::expect_cpu(op, "x", x);
  if (x.dim() < 1) checks::fail("spu::", op, ": x must have at least one dimension, got a scalar");
  const int64_t cols = x.size(x.dim() - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return {rows, cols};
}

// A row of values beside x, contiguous, in x's dtype or fp32; null where it is not given.
Tensor vector_of(const char* op, const char* what, const std::optional<Tensor>& t, const Tensor& x, int64_t cols) {
  if (!t.has_value()) return Tensor();
  checks::expect_cpu(op, what, *t);
  if (t->scalar_type() != ScalarType::Float) checks::expect_same_dtype(op, what, *t, "x", x);
  if (t->dim() != 1 || t->size(0) != cols) {
    checks::fail("spu::", op, ": ", what, ' ', checks::shape(*t), " does not fit rows of ", cols);
  }
  return dense(*t);
}

Tensor like_x(const char* op, const char* what, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return Tensor();
  checks::expect_cpu(op, what, *t);
  checks::expect_same_dtype(op, what, *t, "x", x);
  checks::expect_same_shape(op, what, *t, "x", x);
  return dense(*t);
}

const void* data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

const float* statistics(const char* op, const char* what, const Tensor& t, int64_t rows) {
  checks::expect_cpu(op, what, t);
  checks::expect_dtype(op, what, t, ScalarType::Float);
  if (!t.is_contiguous() || t.numel() != rows) {
    checks::fail("spu::", op, ": ", what, " must be contiguous with ", rows, " values, got ", checks::shape(t));
  }
  return static_cast<const float*>(t.const_data_ptr());
}

bool is_half(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

// (y, mean, rstd, sum); y in x's dtype, or of 16 bits from fp32
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, Norm n, const Tensor& given,
                                                   const std::optional<Tensor>& residual,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, ScalarType dtype) {
  const Size size = size_of(op, given);
  const Tensor x = dense(given), other = like_x(op, "residual", residual, x);
  const Tensor w = vector_of(op, "weight", weight, x, size.cols), b = vector_of(op, "bias", bias, x, size.cols);
  if (w.defined() && b.defined()) checks::expect_same_dtype(op, "bias", b, "weight", w);
  Tensor y = new_empty(x, sizes_of(x), dtype), mean;
  Tensor rstd = new_empty(x, {size.rows}, ScalarType::Float);
  if (n.layer) mean = new_empty(x, {size.rows}, ScalarType::Float);
  Tensor sum = other.defined() ? empty_as(x) : new_empty(x, {0}, x.scalar_type());
  n.type = storage_type(op, "x", x), n.y_type = storage_type(op, "y", y);
  n.weight_type = w.defined() ? storage_type(op, "weight", w) : b.defined() ? storage_type(op, "bias", b) : n.type;
  n.rows = size.rows, n.cols = size.cols;
  n.x = x.const_data_ptr(), n.residual = data(other), n.weight = data(w), n.bias = data(b);
  n.y = y.mutable_data_ptr(), n.sum = sum.mutable_data_ptr();
  n.mean = n.layer ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
  n.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const KernelTable& k = kernels();
  for_ranges(n.rows, kGrain / (n.cols + 1) + 1, [&](int64_t begin, int64_t end) { k.norm(n, begin, end); });
  return {y, mean, rstd, sum};
}

// out [cols] = the sum of the blocks' rows
void add_blocks(const std::vector<float>& blocks, int64_t count, int64_t cols, Tensor& out) {
  const KernelTable& k = kernels();
  float* sums = static_cast<float*>(out.mutable_data_ptr());
  for_ranges((cols + 63) / 64, kGrain / (64 * count + 1) + 1, [&](int64_t begin, int64_t end) {
    k.column_sums(Type::fp32, blocks.data(), count, cols, begin * 64, std::min(cols, end * 64), sums);
  });
}

// (dx, dw, db): empty where not wanted
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, Norm n, const Tensor& grad,
                                            const std::optional<Tensor>& dsum, const Tensor& kept,
                                            const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                                            bool needs_dx, bool needs_dw, bool needs_db) {
  const Size size = size_of(op, kept);
  const Tensor x = dense(kept), more = like_x(op, "dsum", dsum, x);
  const Tensor w = vector_of(op, "weight", weight, x, size.cols);
  const bool narrow = !n.layer && x.scalar_type() == ScalarType::Float && is_half(grad.scalar_type());
  if (narrow) checks::expect_same_shape(op, "dy", grad, "x", x);
  const Tensor dy = narrow ? dense(grad) : like_x(op, "dy", grad, x);
  n.type = storage_type(op, "x", x), n.y_type = storage_type(op, "dy", dy);
  n.weight_type = w.defined() ? storage_type(op, "weight", w) : n.type;
  n.rows = size.rows, n.cols = size.cols;
  n.x = x.const_data_ptr(), n.dy = dy.const_data_ptr(), n.dsum = data(more), n.weight = data(w);
  if (n.layer) n.mean = const_cast<float*>(statistics(op, "mean", mean, n.rows));
  n.rstd = const_cast<float*>(statistics(op, "rstd", rstd, n.rows));
  Tensor dx = needs_dx ? empty_as(x) : new_empty(x, {0}, x.scalar_type());
  Tensor dw = new_empty(x, {needs_dw ? n.cols : int64_t{0}}, ScalarType::Float);
  Tensor db = new_empty(x, {needs_db ? n.cols : int64_t{0}}, ScalarType::Float);
  n.dx = needs_dx ? dx.mutable_data_ptr() : nullptr;
  n.block_rows = std::max(kLeastRows, (n.rows + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (n.rows + n.block_rows - 1) / n.block_rows;
  std::vector<float> dws(static_cast<size_t>(needs_dw ? blocks * n.cols : 0));
  std::vector<float> dbs(static_cast<size_t>(needs_db ? blocks * n.cols : 0));
  n.dw = needs_dw ? dws.data() : nullptr, n.db = needs_db ? dbs.data() : nullptr;
  const KernelTable& k = kernels();
  const int64_t grain = kGrain / (n.block_rows * n.cols + 1) + 1;
  for_ranges(blocks, grain, [&](int64_t begin, int64_t end) { k.norm_backward(n, begin, end); });
  if (needs_dw) add_blocks(dws, blocks, n.cols, dw);
  if (needs_db) add_blocks(dbs, blocks, n.cols, db);
  return {dx, dw, db};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                                            double eps, double offset, bool rounded) {
  Norm n = {};
  n.rounded = rounded, n.eps = static_cast<float>(eps), n.offset = static_cast<float>(offset);
  const auto [y, mean, rstd, sum] = forward("rms_norm", n, x, residual, weight, std::nullopt, x.scalar_type());
  return {y, rstd, sum};
}

std::tuple<Tensor, Tensor> rms_norm_to(Tensor x, std::optional<Tensor> weight, double eps, double offset, bool rounded,
                                       ScalarType dtype) {
  Norm n = {};
  n.rounded = rounded, n.eps = static_cast<float>(eps), n.offset = static_cast<float>(offset);
  const bool direct = dtype == x.scalar_type() || (x.scalar_type() == ScalarType::Float && is_half(dtype));
  const ScalarType made = direct ? dtype : x.scalar_type();
  const auto [y, mean, rstd, sum] = forward("rms_norm_to", n, x, std::nullopt, weight, std::nullopt, made);
  return {direct ? y : torch::stable::to(y, dtype), rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, std::optional<Tensor> dsum, Tensor x,
                                             std::optional<Tensor> weight, Tensor rstd, double offset, bool rounded,
                                             bool needs_dx, bool needs_dw) {
  Norm n = {};
  n.rounded = rounded, n.offset = static_cast<float>(offset);
  const char* op = "rms_norm_backward";
  const auto [dx, dw, db] = backward(op, n, dy, dsum, x, weight, rstd, rstd, needs_dx, needs_dw, false);
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                      double eps) {
  Norm n = {};
  n.layer = true, n.eps = static_cast<float>(eps);
  return forward("layer_norm", n, x, residual, weight, bias, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, std::optional<Tensor> dsum, Tensor x,
                                                       std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                                       bool needs_dx, bool needs_dw, bool needs_db) {
  Norm n = {};
  n.layer = true;
  return backward("layer_norm_backward", n, dy, dsum, x, weight, mean, rstd, needs_dx, needs_dw, needs_db);
}

}  // namespace spu::cpu
