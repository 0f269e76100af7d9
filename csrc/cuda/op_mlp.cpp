// spu::mlp_dz on a CUDA device.
#include "cuda/ops.h"
#include "cuda/pointwise.h"
#include "cuda/tensors.h"

namespace spu::cuda {

// The derivative is in the product's epilogue by plain FMA and, for the gelu of the form with tanh, by cuBLASLt. After
// a product by CUTLASS, which rounds, it is a pass in place; so are h and the sums always.
std::tuple<Tensor, Tensor, Tensor> mlp_dz(Tensor dy, Tensor w_out, Tensor saved, Text activation, bool needs_h,
                                          bool needs_sums) {
  const char* op = "mlp_dz";
  const math::Act act = act_of(op, activation);
  for (const Tensor* t : {&dy, &w_out, &saved}) expect_device(op, "an operand", *t, dy);
  checks::expect_same_dtype(op, "dy", dy, "w_out", w_out);
  checks::expect_same_dtype(op, "dy", dy, "saved", saved);
  const Matrix g = as_matrix(op, "dy", dy), w = as_weight(op, w_out);
  expect_output(op, dy, g, w_out, w);
  if (sizes_of(saved) != with_last(dy, w.cols)) {
    checks::fail("spu::mlp_dz: saved ", checks::shape(saved), " does not fit dy ", checks::shape(dy), " and w_out ",
                 checks::shape(w_out));
  }
  const Tensor kept = dense(saved);
  const std::vector<int64_t> none = {0};
  Tensor dz = empty_as(kept), h = needs_h ? empty_as(kept) : new_empty(dy, none, dy.scalar_type());
  Tensor sums = new_empty(dy, needs_sums ? std::vector<int64_t>{w.cols} : none, ScalarType::Float);
  const OnDevice on(dy);
  TensorScratch scratch(dy);
  Gemm product = {Form::dx, storage_type(op, "dy", dy), g.rows, w.cols, g.cols, g.operand(), w.operand()};
  product.out = dz.mutable_data_ptr();
  product.saved = kept.const_data_ptr();
  product.act = act;
  if (dz.numel() > 0) launch_gemm(product, on.capability(), on.stream(), scratch);
  if (needs_h)
    launch_activation(product.type, act, product.saved, nullptr, h.mutable_data_ptr(), h.numel(), on.stream());
  if (needs_sums) {
    RowSums rows = {product.type, product.out, g.rows, w.cols};
    rows.main_grad = static_cast<float*>(sums.mutable_data_ptr());
    rows.inv_scale = zero_and_one() + 1;
    launch_row_sums(rows, scratch, on.stream());
  }
  return {dz, h, sums};
}

}  // namespace spu::cuda
