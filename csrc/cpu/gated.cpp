// spu::gated_*: the torch side of the gated MLP. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include "cpu/products.h"
#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

void expect_pair(const char* op, const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  checks::expect_same_dtype(op, a_name, a, b_name, b);
  checks::expect_same_shape(op, a_name, a, b_name, b);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Text activation, bool keep) {
  const char* op = "gated_linear";
  const Matrix in = as_matrix(op, "x", x), gate_w = as_weight(op, w_gate), up_w = as_weight(op, w_up);
  checks::expect_same_dtype(op, "x", x, "w_gate", w_gate);
  expect_pair(op, w_gate, "w_gate", w_up, "w_up");
  if (in.cols != gate_w.cols) {
    checks::fail("spu::gated_linear: x ", checks::shape(x), " does not fit w_gate ", checks::shape(w_gate));
  }
  const std::vector<int64_t> sizes = with_last(x, gate_w.rows);
  Tensor h = new_empty(x, sizes, x.scalar_type());
  Tensor gate = new_empty(x, keep ? sizes : std::vector<int64_t>{0}, x.scalar_type()), up = empty_as(gate);
  Epilogue e = {};
  e.kind = Epilogue::gated;
  e.act = gate_act_of(op, activation);
  e.out_type = in.type;
  e.out = h.mutable_data_ptr();
  e.preact = keep ? gate.mutable_data_ptr() : nullptr;
  e.up = keep ? up.mutable_data_ptr() : nullptr;
  const Operand twin = up_w.transposed();
  if (h.numel() > 0) {
    multiply(ProductOp::gated_linear,
             {in.rows, gate_w.rows, in.cols, in.operand(), gate_w.transposed(), nullptr, &twin}, e);
  }
  return {h, gate, up};
}

std::tuple<Tensor, Tensor, Tensor> gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Text activation,
                                             bool keep) {
  auto [h, gate, up] = gated_linear(x, w_gate, w_up, activation, keep);
  return {std::get<0>(linear(h, w_down, std::nullopt, "none", false)), gate, up};
}

std::tuple<Tensor, Tensor, Tensor> gated_mlp_add(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Text activation,
                                                 Tensor addend) {
  auto [h, gate, up] = gated_linear(x, w_gate, w_up, activation, true);
  return {linear_add(h, w_down, std::nullopt, addend), gate, up};
}

std::tuple<Tensor, Tensor, Tensor> gated_dz(Tensor dh, Tensor gate, Tensor up, Text activation) {
  const char* op = "gated_dz";
  const math::Act act = gate_act_of(op, activation);
  for (const Tensor* t : {&dh, &gate, &up}) checks::expect_cpu(op, "an operand", *t);
  expect_pair(op, dh, "dh", gate, "gate");
  expect_pair(op, dh, "dh", up, "up");
  const Type type = storage_type(op, "dh", dh);
  const Tensor d = dense(dh), g = dense(gate), u = dense(up);
  Tensor dgate = empty_as(dh), dup = empty_as(dh), h = empty_as(dh);
  const GatedBackward b = {d.const_data_ptr(),       g.const_data_ptr(),     u.const_data_ptr(),
                           dgate.mutable_data_ptr(), dup.mutable_data_ptr(), h.mutable_data_ptr()};
  const KernelTable& k = kernels();
  for_ranges(dh.numel(), kGrain, [&](int64_t begin, int64_t end) { k.gated_backward(type, act, b, begin, end); });
  return {dgate, dup, h};
}

std::tuple<Tensor, Tensor, Tensor> gated_dh(Tensor dy, Tensor w_down, Tensor gate, Tensor up, Text activation) {
  const char* op = "gated_dh";
  const Matrix d = as_matrix(op, "dy", dy), w = as_weight(op, w_down);
  checks::expect_cpu(op, "gate", gate);
  checks::expect_cpu(op, "up", up);
  checks::expect_same_dtype(op, "dy", dy, "w_down", w_down);
  checks::expect_same_dtype(op, "dy", dy, "gate", gate);
  expect_pair(op, gate, "gate", up, "up");
  expect_output(op, dy, d, w_down, w);
  if (sizes_of(gate) != with_last(dy, w.cols)) {
    checks::fail("spu::gated_dh: gate ", checks::shape(gate), " does not fit dy ", checks::shape(dy), " and w_down ",
                 checks::shape(w_down));
  }
  const Tensor g = dense(gate), u = dense(up);
  Tensor dgate = empty_as(g), dup = empty_as(g), h = empty_as(g);
  Epilogue e = {};
  e.kind = Epilogue::gated_derivative;
  e.act = gate_act_of(op, activation);
  e.out_type = d.type;
  e.out = dgate.mutable_data_ptr();
  e.up = dup.mutable_data_ptr();
  e.acted = h.mutable_data_ptr();
  e.saved = g.const_data_ptr();
  e.saved_up = u.const_data_ptr();
  if (h.numel() > 0) {
    multiply(ProductOp::linear_dx, {d.rows, w.cols, d.cols, d.operand(), w.operand(), nullptr, nullptr}, e);
  }
  return {dgate, dup, h};
}

Tensor gated_dx(Tensor dgate, Tensor dup, Tensor w_gate, Tensor w_up) {
  const char* op = "gated_dx";
  expect_pair(op, dgate, "dgate", dup, "dup");
  expect_pair(op, w_gate, "w_gate", w_up, "w_up");
  checks::expect_same_dtype(op, "dgate", dgate, "w_gate", w_gate);
  const Matrix g = as_matrix(op, "dgate", dgate), u = as_matrix(op, "dup", dup);
  const Matrix gate_w = as_weight(op, w_gate), up_w = as_weight(op, w_up);
  if (g.cols != gate_w.rows) {
    checks::fail("spu::gated_dx: dgate ", checks::shape(dgate), " does not fit w_gate ", checks::shape(w_gate));
  }
  Tensor dx = new_empty(dgate, with_last(dgate, gate_w.cols), dgate.scalar_type());
  Epilogue e = {};
  e.out = dx.mutable_data_ptr();
  e.out_type = g.type;
  const Operand a2 = u.operand(), b2 = up_w.operand();
  if (dx.numel() > 0)
    multiply(ProductOp::gated_dx, {g.rows, gate_w.cols, g.cols, g.operand(), gate_w.operand(), &a2, &b2}, e);
  return dx;
}

}  // namespace spu::cpu
