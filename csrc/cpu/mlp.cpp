// spu::mlp_dz: the torch side of the MLP's own gradient. See kernels.h for the arithmetic's contract.
#include "cpu/ops.h"

#include "cpu/tensors.h"

namespace spu::cpu {

std::tuple<Tensor, Tensor, Tensor> mlp_dz(Tensor dy, Tensor w_out, Tensor saved, Text activation, bool needs_h,
                                          bool needs_sums) {
  const char* op = "mlp_dz";
  const Matrix g = as_matrix(op, "dy", dy), w = as_weight(op, w_out);
  checks::expect_cpu(op, "saved", saved);
  checks::expect_same_dtype(op, "dy", dy, "w_out", w_out);
  checks::expect_same_dtype(op, "dy", dy, "saved", saved);
  expect_output(op, dy, g, w_out, w);
  if (sizes_of(saved) != with_last(dy, w.cols)) {
    checks::fail("spu::mlp_dz: saved ", checks::shape(saved), " does not fit dy ", checks::shape(dy), " and w_out ",
                 checks::shape(w_out));
  }
  const Tensor kept = dense(saved);
  const std::vector<int64_t> none = {0};
  Tensor dz = empty_as(kept), h = needs_h ? empty_as(kept) : new_empty(dy, none, dy.scalar_type());
  Tensor sums = new_empty(dy, needs_sums ? std::vector<int64_t>{w.cols} : none, ScalarType::Float);
  if (needs_sums) torch::stable::fill_(sums, 0.0);
  Epilogue e = {};
  e.kind = Epilogue::derivative;
  e.act = act_of(op, activation);
  e.out_type = g.type;
  e.out = dz.mutable_data_ptr();
  e.saved = kept.const_data_ptr();
  e.acted = needs_h ? h.mutable_data_ptr() : nullptr;
  e.column_sums = needs_sums ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  if (dz.numel() > 0) kernels().gemm({g.rows, w.cols, g.cols, g.operand(), w.operand(), nullptr, nullptr}, e);
  return {dz, h, sums};
}

}  // namespace spu::cpu
