// spu::adamw_ and spu::grad_sqnorm over lists of tensors on a CUDA device.
#include "cuda/ops.h"
#include "cuda/optim.h"
#include "cuda/tensors.h"
#include "torch/adamw.h"

namespace spu::cuda {
void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay) {
  if (params.empty()) return;
  const Tensor& first = params[0];
  lists::Dense dense;
  const lists::AdamWCall call = lists::adamw_call(
      {params, grads, masters, exp_avgs, exp_avg_sqs, steps}, dense,
      [&](const char* what, const Tensor& t) { expect_device("adamw_", what, t, first); },
      [&](const char* what, const Tensor& t) { scalar_data("adamw_", what, t, first); });
  if (call.kept != math::Master::fp32) {
    checks::fail("spu::adamw_: the CUDA kernels take fp32 masters, not corrections; use the reference backend");
  }
  if (grads[0].scalar_type() != ScalarType::Float) checks::fail("spu::adamw_: the CUDA kernels take fp32 gradients");
  const float* scale = scalar_data("adamw_", "grad_scale", grad_scale, first);
  const AdamWSettings settings = {
      lr, beta1, beta2, eps, weight_decay, scale, scalar_data("adamw_", "found_inf", found_inf, first)};
  const OnDevice on(first);
  launch_adamw(storage_type("adamw_", "param", first), call.moments, call.items, settings, on.stream());
  dense.finish();
}

Tensor grad_sqnorm(std::vector<Tensor> grads) {
  if (grads.empty()) checks::fail("spu::grad_sqnorm: no gradients; the sum of none is 0");
  std::vector<Tensor> kept;
  std::vector<Values1d> list;
  for (const Tensor& grad : grads) {
    expect_device("grad_sqnorm", "grad", grad, grads[0]);
    checks::expect_dtype("grad_sqnorm", "grad", grad, ScalarType::Float);
    kept.push_back(dense(grad));
    list.push_back({static_cast<const float*>(kept.back().const_data_ptr()), grad.numel()});
  }
  Tensor out = new_empty(grads[0], {1}, ScalarType::Double);
  const Tensor partial = new_empty(grads[0], {square_sum_pieces(list)}, ScalarType::Double);
  const OnDevice on(grads[0]);
  launch_square_sum(list, static_cast<double*>(partial.mutable_data_ptr()),
                    static_cast<double*>(out.mutable_data_ptr()), on.stream());
  return out;
}

}  // namespace spu::cuda
