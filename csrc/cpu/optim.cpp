// spu::adamw_ and spu::grad_sqnorm.
#include "cpu/optim.h"

#include <algorithm>
#include <cmath>

#include "cpu/tensors.h"

namespace spu {
namespace cpu {
namespace {

void expect_state(const char* what, const Tensor& t, const Tensor& param) {
  checks::expect_cpu("adamw_", what, t);
  checks::expect_dtype("adamw_", what, t, ScalarType::Float);
  checks::expect_same_shape("adamw_", what, t, "param", param);
}

math::AdamWStep step_of(double step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  math::AdamWStep k;
  k.decay = static_cast<float>(1.0 - lr * weight_decay);
  k.one_minus_b1 = static_cast<float>(1.0 - beta1);
  k.b2 = static_cast<float>(beta2);
  k.one_minus_b2 = static_cast<float>(1.0 - beta2);
  k.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  k.bias2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
  k.eps = static_cast<float>(eps);
  return k;
}

// What all parameters of a call share.
struct Shared {
  float grad_scale;
  double lr, beta1, beta2, eps, weight_decay;
};

void update_one(const Tensor& param, const Tensor& grad, const Tensor* master, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& step, const Shared& s) {
  const Type type = storage_type("adamw_", "param", param);
  Writable copy(param), m(exp_avg), v(exp_avg_sq), fp32(master != nullptr ? *master : param);
  const Tensor g = dense(grad);
  const float* gradient = static_cast<const float*>(g.const_data_ptr());
  void* out = master != nullptr ? copy.data<void>() : nullptr;
  const math::AdamWStep k = step_of(value(step), s.lr, s.beta1, s.beta2, s.eps, s.weight_decay);
  const KernelTable& table = kernels();
  for_ranges(param.numel(), kGrain, [&](int64_t begin, int64_t end) {
    table.adamw(type, out, fp32.data<float>(), gradient, m.data<float>(), v.data<float>(), s.grad_scale, k, begin, end);
  });
  m.finish();
  v.finish();
  fp32.finish();
  if (master != nullptr) copy.finish();
}

// Partial sums over pieces of a fixed size are added in order: the result depends on no thread count.
double square_sum(const Tensor& grad) {
  checks::expect_cpu("grad_sqnorm", "grad", grad);
  checks::expect_dtype("grad_sqnorm", "grad", grad, ScalarType::Float);
  const Tensor values = dense(grad);
  const float* x = static_cast<const float*>(values.const_data_ptr());
  constexpr int64_t piece = 65536;
  const int64_t count = values.numel();
  std::vector<double> sums(static_cast<size_t>((count + piece - 1) / piece));
  const KernelTable& k = kernels();
  for_ranges(static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[static_cast<size_t>(i)] = k.square_sum(x, i * piece, std::min(count, (i + 1) * piece));
    }
  });
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

void expect_length(const char* what, const std::vector<Tensor>& list, size_t wanted) {
  if (list.size() != wanted) {
    checks::fail("spu::adamw_: ", what, " has ", list.size(), " tensors for ", wanted, " parameters");
  }
}

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
  for (size_t i = 0; i < params.size(); ++i) {
    checks::expect_cpu("adamw_", "param", params[i]);
    const Type type = storage_type("adamw_", "param", params[i]);
    if (half == (type == Type::fp32)) {
      checks::fail("spu::adamw_: a 16-bit param needs an fp32 master and an fp32 param has none; param is ",
                   checks::name(params[i].scalar_type()), half ? " with a master" : " without one");
    }
    expect_state("grad", grads[i], params[i]);
    expect_state("exp_avg", exp_avgs[i], params[i]);
    expect_state("exp_avg_sq", exp_avg_sqs[i], params[i]);
    if (half) expect_state("master", masters[i], params[i]);
    checks::expect_scalar("adamw_", "step", steps[i]);
  }
  checks::expect_scalar("adamw_", "grad_scale", grad_scale);
  checks::expect_scalar("adamw_", "found_inf", found_inf);
  if (value(found_inf) != 0.0f) return;
  const Shared shared = {value(grad_scale), lr, beta1, beta2, eps, weight_decay};
  for (size_t i = 0; i < params.size(); ++i) {
    update_one(params[i], grads[i], half ? &masters[i] : nullptr, exp_avgs[i], exp_avg_sqs[i], steps[i], shared);
  }
}

Tensor grad_sqnorm(std::vector<Tensor> grads) {
  if (grads.empty()) checks::fail("spu::grad_sqnorm: no gradients; the sum of none is 0");
  double total = 0;
  for (const Tensor& grad : grads) total += square_sum(grad);
  Tensor out = new_empty(grads[0], {1}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(total);
  return out;
}

}  // namespace cpu
}  // namespace spu
