// spu::adamw_ and spu::grad_sqnorm over lists of tensors on a CUDA device.
#include "cuda/ops.h"
#include "cuda/optim.h"
#include "cuda/tensors.h"

namespace spu {
namespace cuda {
namespace {

void expect_length(const char* what, const std::vector<Tensor>& list, size_t wanted) {
  if (list.size() != wanted) {
    checks::fail("spu::adamw_: ", what, " has ", list.size(), " tensors for ", wanted, " parameters");
  }
}

float* state_data(const char* what, const Tensor& t, const Tensor& param) {
  expect_device("adamw_", what, t, param);
  checks::expect_dtype("adamw_", what, t, ScalarType::Float);
  checks::expect_same_shape("adamw_", what, t, "param", param);
  return static_cast<float*>(t.mutable_data_ptr());
}

// Dense stand-ins for the tensors of a call that are not, written back at the end.
class Writables {
 public:
  void* data(const Tensor& t) {
    if (t.is_contiguous()) return t.mutable_data_ptr();
    copies_.push_back({t, torch::stable::contiguous(t)});
    return copies_.back().second.mutable_data_ptr();
  }
  const float* read(const Tensor& t) {
    if (t.is_contiguous()) return static_cast<const float*>(t.const_data_ptr());
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }
  void finish() {
    for (auto& [target, copy] : copies_) torch::stable::copy_(target, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<Tensor> kept_;
};

}  // namespace

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const bool half = !masters.empty();
  expect_length("grads", grads, params.size());
  expect_length("masters", masters, half ? params.size() : 0);
  expect_length("exp_avgs", exp_avgs, params.size());
  expect_length("exp_avg_sqs", exp_avg_sqs, params.size());
  expect_length("steps", steps, params.size());
  if (params.empty()) return;
  const Tensor& first = params[0];
  Writables writable;
  std::vector<AdamWTensor> list;
  for (size_t i = 0; i < params.size(); ++i) {
    expect_device("adamw_", "param", params[i], first);
    checks::expect_same_dtype("adamw_", "param", params[i], "the first param", first);
    if (half == (storage_type("adamw_", "param", params[i]) == Type::fp32)) {
      checks::fail("spu::adamw_: a 16-bit param needs an fp32 master and an fp32 param has none; param is ",
                   checks::name(params[i].scalar_type()), half ? " with a master" : " without one");
    }
    state_data("grad", grads[i], params[i]);
    state_data("exp_avg", exp_avgs[i], params[i]);
    state_data("exp_avg_sq", exp_avg_sqs[i], params[i]);
    if (half) state_data("master", masters[i], params[i]);
    list.push_back({half ? writable.data(params[i]) : nullptr,
                    static_cast<float*>(writable.data(half ? masters[i] : params[i])), writable.read(grads[i]),
                    static_cast<float*>(writable.data(exp_avgs[i])), static_cast<float*>(writable.data(exp_avg_sqs[i])),
                    scalar_data("adamw_", "step", steps[i], first), params[i].numel()});
  }
  const AdamWSettings settings = {lr,
                                  beta1,
                                  beta2,
                                  eps,
                                  weight_decay,
                                  scalar_data("adamw_", "grad_scale", grad_scale, first),
                                  scalar_data("adamw_", "found_inf", found_inf, first)};
  const OnDevice on(first);
  launch_adamw(storage_type("adamw_", "param", first), list, settings, on.stream());
  writable.finish();
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
  Tensor out = new_empty(grads[0], {1}, ScalarType::Float);
  const Tensor partial = new_empty(grads[0], {square_sum_pieces(list)}, ScalarType::Double);
  const OnDevice on(grads[0]);
  launch_square_sum(list, static_cast<double*>(partial.mutable_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                    on.stream());
  return out;
}

}  // namespace cuda
}  // namespace spu
