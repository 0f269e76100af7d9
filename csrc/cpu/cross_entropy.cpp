// spu::linear_ce and spu::linear_ce_dz: the logits exist as blocks of a matrix product in the cache, never whole.
#include "cpu/ops.h"

#include <algorithm>
#include <cmath>

#include "cpu/products.h"
#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

struct Logits {
  Matrix hidden, weight;
  Tensor target;
  Product product() const {
    return {hidden.rows, weight.rows, hidden.cols, hidden.operand(), weight.transposed(), nullptr, nullptr};
  }
  const int64_t* targets() const { return static_cast<const int64_t*>(target.const_data_ptr()); }
};

Logits logits_of(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& target) {
  const Matrix in = as_matrix(op, "hidden", hidden), w = as_weight(op, weight);
  checks::expect_same_dtype(op, "hidden", hidden, "weight", weight);
  checks::expect_cpu(op, "target", target);
  if (hidden.dim() != 2 || in.cols != w.cols) {
    checks::fail("spu::", op, ": hidden ", checks::shape(hidden), " must be [rows, ", w.cols, "] to fit weight ",
                 checks::shape(weight));
  }
  if (target.scalar_type() != ScalarType::Long || target.dim() != 1 || target.size(0) != in.rows) {
    checks::fail("spu::", op, ": target must be int64 [", in.rows, "], got shape ", checks::shape(target));
  }
  return {in, w, dense(target)};
}

const float* row_values(const char* op, const char* what, const Tensor& t, int64_t rows) {
  checks::expect_cpu(op, what, t);
  checks::expect_dtype(op, what, t, ScalarType::Float);
  if (!t.is_contiguous() || t.numel() != rows) {
    checks::fail("spu::", op, ": ", what, " must be contiguous with ", rows, " values, got ", checks::shape(t));
  }
  return static_cast<const float*>(t.const_data_ptr());
}

// log sum exp of one row from the maximum and the sum of each group of columns. A maximum that is not finite was not
// subtracted, so that an infinite logit gives an infinite result and a NaN gives NaN.
float log_sum_exp(const float* stats, int64_t groups, int64_t rows, int64_t row) {
  float top = -INFINITY;
  for (int64_t g = 0; g < groups; ++g) top = std::fmax(top, stats[(g * rows + row) * 2]);
  const double shift = std::isfinite(top) ? top : 0.0;
  double sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const float* s = stats + (g * rows + row) * 2;
    if (s[1] == 0.0f) continue;  // logits of -inf alone, whose maximum was not subtracted
    sum += s[1] * std::exp((std::isfinite(s[0]) ? s[0] : 0.0) - shift);
  }
  return static_cast<float>(shift + std::log(sum));
}

// Rows whose statistics, 8 bytes a row and group of columns, exist at a time.
constexpr int64_t kStatRows = 4096;

void expect_targets(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t i = 0; i < rows; ++i) {
    if ((target[i] < 0 || target[i] >= classes) && target[i] != ignore_index) {
      checks::fail("spu::linear_ce: target[", i, "] is ", target[i], ", not 0 to ", classes - 1, " or ", ignore_index);
    }
  }
}

// Loss and log-sum-exp of rows [begin, end).
void some_rows(const Logits& l, int64_t ignore_index, int64_t begin, int64_t end, float* losses, float* sums) {
  const int64_t rows = end - begin, groups = (l.weight.rows + kStatColumns - 1) / kStatColumns;
  std::vector<float> stats(static_cast<size_t>(groups * rows * 2)), found(static_cast<size_t>(rows));
  Product product = l.product();
  product.m = rows;
  product.a.data = static_cast<const char*>(l.hidden.data()) + begin * l.hidden.row * l.hidden.keep.element_size();
  Epilogue e = {};
  e.kind = Epilogue::softmax_stats;
  e.target = l.targets() + begin;
  e.stats = stats.data();
  e.target_value = found.data();
  e.rows = rows;
  multiply(ProductOp::linear_ce, product, e);
  for_ranges(rows, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sums[begin + i] = log_sum_exp(stats.data(), groups, rows, i);
      losses[begin + i] = e.target[i] == ignore_index ? 0.0f : sums[begin + i] - found[static_cast<size_t>(i)];
    }
  });
}

// The logits, fp32: of 16-bit operands as the sums of a main gradient, which are not rounded to 16 bits.
void make_logits(const Logits& l, float* logits) {
  int32_t nonfinite = 0;
  Epilogue e = {};
  e.out = logits;
  e.out_type = Type::fp32;
  if (l.hidden.type == Type::fp32) return multiply(ProductOp::linear, l.product(), e);
  e.kind = Epilogue::main_grad_add;
  e.main_grad = logits;
  e.inv_scale = 1.0f;
  e.nonfinite = &nonfinite;
  multiply(ProductOp::linear_dw, l.product(), e);
}

void expect_values(const char* op, const char* what, const Tensor& t, ScalarType dtype, int64_t numel) {
  checks::expect_cpu(op, what, t);
  checks::expect_dtype(op, what, t, dtype);
  if (!t.is_contiguous() || t.numel() != numel) {
    checks::fail("spu::", op, ": ", what, " must be contiguous with ", numel, " values, got shape ", checks::shape(t));
  }
}

}  // namespace

Tensor linear_ce_and_dz_into(Tensor hidden, Tensor weight, Tensor target, Tensor grad_rows, Tensor logits, Tensor dz,
                             int64_t ignore_index) {
  const char* op = "linear_ce_and_dz_";
  const Logits l = logits_of(op, hidden, weight, target);
  const int64_t rows = l.hidden.rows, classes = l.weight.rows;
  expect_targets(l.targets(), rows, classes, ignore_index);
  const Tensor scaled = dense(grad_rows);
  expect_values(op, "logits", logits, ScalarType::Float, rows * classes);
  expect_values(op, "dz", dz, hidden.scalar_type(), rows * classes);
  Tensor losses = new_empty(hidden, {rows}, ScalarType::Float);
  const CrossEntropy c = {l.hidden.type,
                          classes,
                          static_cast<float*>(logits.mutable_data_ptr()),
                          dz.mutable_data_ptr(),
                          l.targets(),
                          row_values(op, "grad_rows", scaled, rows),
                          static_cast<float*>(losses.mutable_data_ptr()),
                          ignore_index};
  if (rows * classes > 0) make_logits(l, c.logits);
  const KernelTable& k = kernels();
  for_ranges(rows, kGrain / (classes + 1) + 1, [&](int64_t begin, int64_t end) { k.cross_entropy(c, begin, end); });
  return losses;
}

std::tuple<Tensor, Tensor> linear_ce(Tensor hidden, Tensor weight, Tensor target, int64_t ignore_index) {
  const Logits l = logits_of("linear_ce", hidden, weight, target);
  const int64_t rows = l.hidden.rows;
  expect_targets(l.targets(), rows, l.weight.rows, ignore_index);
  Tensor loss = new_empty(hidden, {rows}, ScalarType::Float), lse = new_empty(hidden, {rows}, ScalarType::Float);
  float *losses = static_cast<float*>(loss.mutable_data_ptr()), *sums = static_cast<float*>(lse.mutable_data_ptr());
  for (int64_t i = 0; i < rows; i += kStatRows) {
    some_rows(l, ignore_index, i, std::min(rows, i + kStatRows), losses, sums);
  }
  return {loss, lse};
}

Tensor linear_ce_dz(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor grad_rows, int64_t ignore_index) {
  const char* op = "linear_ce_dz";
  const Logits l = logits_of(op, hidden, weight, target);
  const Tensor sums = dense(lse), scaled = dense(grad_rows);
  Tensor dz = new_empty(hidden, {l.hidden.rows, l.weight.rows}, hidden.scalar_type());
  Epilogue e = {};
  e.kind = Epilogue::softmax_grad;
  e.target = l.targets();
  e.lse = row_values(op, "lse", sums, l.hidden.rows);
  e.grad = row_values(op, "grad_rows", scaled, l.hidden.rows);
  e.ignore_index = ignore_index;
  e.out = dz.mutable_data_ptr();
  e.out_type = l.hidden.type;
  multiply(ProductOp::linear_ce, l.product(), e);
  return dz;
}

}  // namespace spu::cpu
