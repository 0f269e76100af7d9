// spu::linear* and unscale_: the torch side of the fused linear layer. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include <tuple>

#include "cpu/products.h"
#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

Epilogue store_only(Type type, void* out) {
  Epilogue e = {};
  e.out = out;
  e.out_type = type;
  e.act = math::Act::none;
  return e;
}

float* main_grad_data(const char* op, const Tensor& main_grad, int64_t numel) {
  checks::expect_cpu(op, "main_grad", main_grad);
  return main_grad_values(op, main_grad, numel);
}

std::vector<float> row_sums(const Matrix& dz, const Tensor& rows) {
  std::vector<float> sums(static_cast<size_t>(dz.cols));
  const KernelTable& k = kernels();
  // Columns are split in whole cache lines; a column's order of additions never depends on the split.
  const int64_t groups = (dz.cols + 63) / 64;
  const int64_t grain = dz.rows > 0 ? kGrain / (64 * dz.rows) + 1 : groups;
  for_ranges(groups, grain, [&](int64_t begin, int64_t end) {
    const int64_t stop = end * 64 < dz.cols ? end * 64 : dz.cols;
    k.column_sums(dz.type, rows.const_data_ptr(), dz.rows, dz.cols, begin * 64, stop, sums.data());
  });
  return sums;
}

// Adds values to main_grad under the sink's contract.
void sink(Type type, const void* values, int64_t count, float* main_grad, const Tensor& inv_scale,
          const Tensor& found_inf, bool accumulate) {
  int32_t bad = 0;
  const float scale = value(inv_scale);
  const KernelTable& k = kernels();
  for_ranges(count, kGrain, [&](int64_t begin, int64_t end) {
    if (k.unscale(type, values, main_grad, scale, accumulate, begin, end)) {
      __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
    }
  });
  if (bad) raise_found_inf(found_inf);
}

Tensor expect_addend(const Tensor& x, const Tensor& weight, const Tensor& addend, const std::vector<int64_t>& sizes) {
  checks::expect_cpu("linear_add", "addend", addend);
  if (addend.scalar_type() != ScalarType::Float) checks::expect_same_dtype("linear_add", "addend", addend, "x", x);
  if (sizes_of(addend) != sizes) {
    checks::fail("spu::linear_add: addend ", checks::shape(addend), " does not fit x ", checks::shape(x),
                 " and weight ", checks::shape(weight));
  }
  return dense(addend);
}

struct How {
  math::Act act;
  bool keep_preact;
  int64_t call;          // whose products all are of this x, or 0
  const Tensor* addend;  // of y's shape, in its dtype or fp32, as then y is; or null
};

// y = act(x weight^T + bias), or the addend plus that, and the pre-activation where it is kept.
std::tuple<Tensor, Tensor> product(const Tensor& x, const Matrix& in, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const How& how) {
  const Matrix w = as_weight("linear", weight);
  checks::expect_same_dtype("linear", "x", x, "weight", weight);
  expect_input(x, in, weight, w);
  Tensor dense_bias, addend;
  if (bias.has_value()) {
    checks::expect_cpu("linear", "bias", *bias);
    checks::expect_same_dtype("linear", "bias", *bias, "weight", weight);
    expect_bias(*bias, weight);
    dense_bias = dense(*bias);
  }
  Epilogue e = {};
  e.act = how.act;
  e.out_type = e.sum_type = in.type;
  const std::vector<int64_t> sizes = with_last(x, w.rows);
  if (how.addend) {
    addend = expect_addend(x, weight, *how.addend, sizes);
    e.addend = addend.const_data_ptr(), e.out_type = storage_type("linear_add", "addend", addend);
  }
  Tensor y = new_empty(x, sizes, how.addend ? addend.scalar_type() : x.scalar_type());
  Tensor preact = new_empty(x, how.keep_preact ? sizes : std::vector<int64_t>{0}, x.scalar_type());
  e.bias = bias.has_value() ? dense_bias.const_data_ptr() : nullptr;
  e.out = y.mutable_data_ptr();
  e.preact = how.keep_preact ? preact.mutable_data_ptr() : nullptr;
  Product p = {in.rows, w.rows, in.cols, in.operand(), w.transposed(), nullptr, nullptr};
  p.shared_a = how.call;
  if (y.numel() > 0) multiply(ProductOp::linear, p, e);
  return {y, preact};
}

}  // namespace

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Text activation,
                                  bool keep_preact) {
  const math::Act act = act_of("linear", activation);
  return product(x, as_matrix("linear", "x", x), weight, bias, {act, keep_preact, 0, nullptr});
}

Tensor linear_add(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor addend) {
  const Matrix in = as_matrix("linear", "x", x);
  return std::get<0>(product(x, in, weight, bias, {math::Act::none, false, 0, &addend}));
}

std::vector<Tensor> linear_each(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  if (!biases.empty() && biases.size() != weights.size()) {
    checks::fail("spu::linear_each: ", biases.size(), " biases for ", weights.size(),
                 " weights: give none, or one each");
  }
  const Matrix in = as_matrix("linear", "x", x);
  const int64_t call = next_call();
  std::vector<Tensor> found;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::optional<Tensor> bias = biases.empty() ? std::optional<Tensor>() : biases[i];
    found.push_back(std::get<0>(product(x, in, weights[i], bias, {math::Act::none, false, call, nullptr})));
  }
  return found;
}

Tensor linear_dz(Tensor dy, Tensor saved, Text activation) {
  const math::Act act = act_of("linear_dz", activation);
  checks::expect_cpu("linear_dz", "dy", dy);
  checks::expect_cpu("linear_dz", "saved", saved);
  checks::expect_same_dtype("linear_dz", "dy", dy, "saved", saved);
  checks::expect_same_shape("linear_dz", "dy", dy, "saved", saved);
  const Type type = storage_type("linear_dz", "dy", dy);
  const Tensor g = dense(dy), s = dense(saved);
  Tensor dz = empty_as(dy);
  const KernelTable& k = kernels();
  for_ranges(dz.numel(), kGrain, [&](int64_t begin, int64_t end) {
    k.act_backward(type, act, g.const_data_ptr(), s.const_data_ptr(), dz.mutable_data_ptr(), begin, end);
  });
  return dz;
}

Tensor linear_dx(Tensor dz, Tensor weight) {
  const Matrix g = as_matrix("linear_dx", "dz", dz), w = as_weight("linear_dx", weight);
  checks::expect_same_dtype("linear_dx", "dz", dz, "weight", weight);
  expect_output("linear_dx", dz, g, weight, w);
  Tensor dx = new_empty(dz, with_last(dz, w.cols), dz.scalar_type());
  if (dx.numel() > 0) {
    multiply(ProductOp::linear_dx, {g.rows, w.cols, g.cols, g.operand(), w.operand(), nullptr, nullptr},
             store_only(g.type, dx.mutable_data_ptr()));
  }
  return dx;
}

Tensor linear_dw(Tensor dz, Tensor x) {
  const Matrix g = as_matrix("linear_dw", "dz", dz), in = as_matrix("linear_dw", "x", x);
  checks::expect_same_dtype("linear_dw", "dz", dz, "x", x);
  expect_rows("linear_dw", dz, g, x, in);
  Tensor dw = new_empty(dz, {g.cols, in.cols}, dz.scalar_type());
  if (dw.numel() > 0) {
    // Stored as it is, like an input gradient: the table's row for weight gradients is of those into a main gradient.
    multiply(ProductOp::linear_dx, {g.cols, in.cols, g.rows, g.transposed(), in.operand(), nullptr, nullptr},
             store_only(g.type, dw.mutable_data_ptr()));
  }
  return dw;
}

void linear_dw_sink(Tensor dz, Tensor x, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  linear_dw_each({dz}, x, {main_grad}, inv_scale, found_inf, accumulate);
}

void linear_dw_each(std::vector<Tensor> dzs, Tensor x, std::vector<Tensor> main_grads, Tensor inv_scale,
                    Tensor found_inf, bool accumulate) {
  const char* op = "linear_dw_";
  if (dzs.size() != main_grads.size()) {
    checks::fail("spu::linear_dw_each_: ", dzs.size(), " dzs for ", main_grads.size(), " main_grads");
  }
  const Matrix in = as_matrix(op, "x", x);
  checks::expect_scalar(op, "inv_scale", inv_scale);
  checks::expect_scalar(op, "found_inf", found_inf);
  const int64_t call = next_call();
  int32_t nonfinite = 0;
  Epilogue e = {};
  e.kind = Epilogue::main_grad_add;
  e.inv_scale = value(inv_scale);
  e.accumulate = accumulate;
  e.nonfinite = &nonfinite;
  for (size_t i = 0; i < dzs.size(); ++i) {
    const Matrix g = as_matrix(op, "dz", dzs[i]);
    checks::expect_same_dtype(op, "dz", dzs[i], "x", x);
    expect_rows(op, dzs[i], g, x, in);
    e.main_grad = main_grad_data(op, main_grads[i], g.cols * in.cols);
    Product p = {g.cols, in.cols, g.rows, g.transposed(), in.operand(), nullptr, nullptr};
    p.shared_b = call;
    multiply(ProductOp::linear_dw, p, e);
  }
  if (nonfinite) raise_found_inf(found_inf);
}

Tensor linear_db(Tensor dz) {
  const Tensor rows = dense(dz);
  const Matrix g = as_matrix("linear_db", "dz", rows);
  Tensor db = new_empty(dz, {g.cols}, dz.scalar_type());
  const std::vector<float> sums = row_sums(g, rows);
  kernels().convert(Type::fp32, sums.data(), g.type, db.mutable_data_ptr(), 0, g.cols);
  return db;
}

void linear_db_sink(Tensor dz, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  const Tensor rows = dense(dz);
  const Matrix g = as_matrix("linear_db_", "dz", rows);
  checks::expect_scalar("linear_db_", "inv_scale", inv_scale);
  checks::expect_scalar("linear_db_", "found_inf", found_inf);
  float* out = main_grad_data("linear_db_", main_grad, g.cols);
  const std::vector<float> sums = row_sums(g, rows);
  sink(Type::fp32, sums.data(), g.cols, out, inv_scale, found_inf, accumulate);
}

void unscale(Tensor grad, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  const char* op = "unscale_";
  checks::expect_cpu(op, "grad", grad);
  checks::expect_cpu(op, "main_grad", main_grad);
  checks::expect_dtype(op, "main_grad", main_grad, ScalarType::Float);
  checks::expect_same_shape(op, "grad", grad, "main_grad", main_grad);
  checks::expect_scalar(op, "inv_scale", inv_scale);
  checks::expect_scalar(op, "found_inf", found_inf);
  // fp64 gradients exist only in tests of the reference; they are rounded to the fp32 of the main gradient first.
  const Tensor typed = grad.scalar_type() == ScalarType::Double ? torch::stable::to(grad, ScalarType::Float) : grad;
  const Tensor values = dense(typed);
  Writable out(main_grad);
  sink(storage_type(op, "grad", values), values.const_data_ptr(), values.numel(), out.data<float>(), inv_scale,
       found_inf, accumulate);
  out.finish();
}

}  // namespace spu::cpu
