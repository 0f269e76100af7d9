// spu::linear* and unscale_ on a CUDA device.
#include "cuda/ops.h"
#include "cuda/pointwise.h"
#include "cuda/tensors.h"

namespace spu::cuda {
namespace {

void expect_pair(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  expect_device(op, a_name, a, a);
  expect_device(op, b_name, b, a);
  checks::expect_same_dtype(op, a_name, a, b_name, b);
}

// The product of a weight gradient: dz.T @ x.
Gemm weight_product(const char* op, const Tensor& dz, const Matrix& g, const Tensor& x, const Matrix& in) {
  expect_rows(op, dz, g, x, in);
  return {Form::dw, storage_type(op, "dz", dz), g.cols, in.cols, g.rows, g.transposed(), in.operand()};
}

void multiply(const Gemm& g, const Tensor& like) {
  const OnDevice on(like);
  TensorScratch scratch(like);
  launch_gemm(g, on.capability(), on.stream(), scratch);
}

void add_rows(const RowSums& sums, const Tensor& like) {
  const OnDevice on(like);
  TensorScratch scratch(like);
  launch_row_sums(sums, scratch, on.stream());
}

}  // namespace

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Text activation,
                                  bool keep_preact) {
  expect_pair("linear", "x", x, "weight", weight);
  const Matrix in = as_matrix("linear", "x", x), w = as_weight("linear", weight);
  expect_input(x, in, weight, w);
  Gemm g = {Form::forward, storage_type("linear", "x", x), in.rows, w.rows, in.cols, in.operand(), w.transposed()};
  g.act = act_of("linear", activation);
  Tensor dense_bias;
  if (bias.has_value()) {
    expect_pair("linear", "weight", weight, "bias", *bias);
    expect_bias(*bias, weight);
    dense_bias = dense(*bias);
    g.bias = dense_bias.const_data_ptr();
  }
  Tensor y = new_empty(x, with_last(x, w.rows), x.scalar_type());
  Tensor preact = new_empty(x, keep_preact ? with_last(x, w.rows) : std::vector<int64_t>{0}, x.scalar_type());
  g.out = y.mutable_data_ptr();
  g.preact = keep_preact ? preact.mutable_data_ptr() : nullptr;
  if (y.numel() > 0) multiply(g, x);
  return {y, preact};
}

// The second product's epilogue multiplies by act(gate): h is made without a pass of its own, and up is not rounded
// before it. gated_dx stays two products and a sum.
std::tuple<Tensor, Tensor, Tensor> gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Text activation, bool keep) {
  const char* op = "gated_linear";
  const math::Act act = gate_act_of(op, activation);
  checks::expect_same_shape(op, "w_gate", w_gate, "w_up", w_up);
  const Tensor gate = std::get<0>(linear(x, w_gate, std::nullopt, "none", false));
  expect_pair(op, "x", x, "w_up", w_up);
  const Matrix in = as_matrix(op, "x", x), w = as_weight(op, w_up);
  const std::vector<int64_t> none = {0};
  Tensor h = empty_as(gate), up = new_empty(x, keep ? sizes_of(gate) : none, x.scalar_type());
  Gemm g = {Form::forward, storage_type(op, "x", x), in.rows, w.rows, in.cols, in.operand(), w.transposed()};
  g.act = act;
  g.gate = gate.const_data_ptr();
  g.out = h.mutable_data_ptr();
  g.preact = keep ? up.mutable_data_ptr() : nullptr;
  if (h.numel() > 0) multiply(g, x);
  return {h, keep ? gate : new_empty(x, none, x.scalar_type()), up};
}

Tensor linear_dz(Tensor dy, Tensor saved, Text activation) {
  const math::Act act = act_of("linear_dz", activation);
  expect_pair("linear_dz", "dy", dy, "saved", saved);
  checks::expect_same_shape("linear_dz", "dy", dy, "saved", saved);
  const Tensor g = dense(dy), s = dense(saved);
  Tensor dz = empty_as(dy);
  const OnDevice on(dy);
  launch_dz(storage_type("linear_dz", "dy", dy), act, g.const_data_ptr(), s.const_data_ptr(), dz.mutable_data_ptr(),
            dz.numel(), on.stream());
  return dz;
}

Tensor linear_dx(Tensor dz, Tensor weight) {
  expect_pair("linear_dx", "dz", dz, "weight", weight);
  const Matrix g = as_matrix("linear_dx", "dz", dz), w = as_weight("linear_dx", weight);
  expect_output("linear_dx", dz, g, weight, w);
  Tensor dx = new_empty(dz, with_last(dz, w.cols), dz.scalar_type());
  Gemm product = {Form::dx, storage_type("linear_dx", "dz", dz), g.rows, w.cols, g.cols, g.operand(), w.operand()};
  product.out = dx.mutable_data_ptr();
  if (dx.numel() > 0) multiply(product, dz);
  return dx;
}

void linear_dw_sink(Tensor dz, Tensor x, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  const char* op = "linear_dw_";
  expect_pair(op, "dz", dz, "x", x);
  const Matrix g = as_matrix(op, "dz", dz), in = as_matrix(op, "x", x);
  Gemm product = weight_product(op, dz, g, x, in);
  product.main_grad = main_grad_data(op, main_grad, g.cols * in.cols, dz);
  product.inv_scale = scalar_data(op, "inv_scale", inv_scale, dz);
  product.found_inf = flag_data(op, found_inf, dz);
  product.accumulate = accumulate;
  if (g.cols > 0 && in.cols > 0) multiply(product, dz);
}

// Without a sink: the fp32 product, rounded to the storage type by a second kernel. Only a backward outside a scope
// comes here, so that no kernels of its own are compiled for it.
Tensor linear_dw(Tensor dz, Tensor x) {
  expect_pair("linear_dw", "dz", dz, "x", x);
  const Matrix g = as_matrix("linear_dw", "dz", dz), in = as_matrix("linear_dw", "x", x);
  Gemm product = weight_product("linear_dw", dz, g, x, in);
  Tensor dw = new_empty(dz, {g.cols, in.cols}, dz.scalar_type());
  if (dw.numel() == 0) return dw;
  const Tensor wide = new_empty(dz, {g.cols, in.cols}, ScalarType::Float);
  const Tensor one = torch::stable::fill_(new_empty(dz, {1}, ScalarType::Float), 1.0);
  product.main_grad = static_cast<float*>(wide.mutable_data_ptr());
  product.inv_scale = static_cast<const float*>(one.const_data_ptr());
  multiply(product, dz);
  const OnDevice on(dz);
  launch_convert(Type::fp32, wide.const_data_ptr(), product.type, dw.mutable_data_ptr(), dw.numel(), on.stream());
  return dw;
}

Tensor linear_db(Tensor dz) {
  expect_device("linear_db", "dz", dz, dz);
  const Tensor rows = dense(dz);
  const Matrix g = as_matrix("linear_db", "dz", rows);
  Tensor db = new_empty(dz, {g.cols}, dz.scalar_type());
  RowSums sums = {storage_type("linear_db", "dz", dz), rows.const_data_ptr(), g.rows, g.cols};
  sums.out = db.mutable_data_ptr();
  add_rows(sums, dz);
  return db;
}

void linear_db_sink(Tensor dz, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  const char* op = "linear_db_";
  expect_device(op, "dz", dz, dz);
  const Tensor rows = dense(dz);
  const Matrix g = as_matrix(op, "dz", rows);
  RowSums sums = {storage_type(op, "dz", dz), rows.const_data_ptr(), g.rows, g.cols};
  sums.main_grad = main_grad_data(op, main_grad, g.cols, dz);
  sums.inv_scale = scalar_data(op, "inv_scale", inv_scale, dz);
  sums.found_inf = flag_data(op, found_inf, dz);
  sums.accumulate = accumulate;
  add_rows(sums, dz);
}

void unscale(Tensor grad, Tensor main_grad, Tensor inv_scale, Tensor found_inf, bool accumulate) {
  const char* op = "unscale_";
  expect_device(op, "grad", grad, grad);
  checks::expect_same_shape(op, "grad", grad, "main_grad", main_grad);
  // fp64 gradients exist only in tests of the reference; they are rounded to the fp32 of the main gradient first.
  const Tensor typed = grad.scalar_type() == ScalarType::Double ? torch::stable::to(grad, ScalarType::Float) : grad;
  const Tensor values = dense(typed);
  expect_device(op, "main_grad", main_grad, grad);
  checks::expect_dtype(op, "main_grad", main_grad, ScalarType::Float);
  const bool in_place = main_grad.is_contiguous();
  const Tensor out = in_place ? main_grad : torch::stable::contiguous(main_grad);
  const OnDevice on(grad);
  launch_unscale(storage_type(op, "grad", values), values.const_data_ptr(), static_cast<float*>(out.mutable_data_ptr()),
                 scalar_data(op, "inv_scale", inv_scale, grad), flag_data(op, found_inf, grad), accumulate,
                 values.numel(), on.stream());
  if (!in_place) torch::stable::copy_(main_grad, out);
}

std::tuple<Tensor, Tensor, Tensor> gated_dz(Tensor dh, Tensor gate, Tensor up, Text activation) {
  const char* op = "gated_dz";
  const math::Act act = gate_act_of(op, activation);
  expect_pair(op, "dh", dh, "gate", gate);
  expect_pair(op, "dh", dh, "up", up);
  checks::expect_same_shape(op, "dh", dh, "gate", gate);
  checks::expect_same_shape(op, "dh", dh, "up", up);
  const Tensor g = dense(dh), a = dense(gate), b = dense(up);
  Tensor dgate = empty_as(dh), dup = empty_as(dh), h = empty_as(dh);
  const OnDevice on(dh);
  launch_gated_dz(storage_type(op, "dh", dh), act, g.const_data_ptr(), a.const_data_ptr(), b.const_data_ptr(),
                  dgate.mutable_data_ptr(), dup.mutable_data_ptr(), h.mutable_data_ptr(), dh.numel(), on.stream());
  return {dgate, dup, h};
}

}  // namespace spu::cuda
