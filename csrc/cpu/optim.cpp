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

}  // namespace

void adamw(Tensor param, Tensor grad, std::optional<Tensor> master, Tensor exp_avg, Tensor exp_avg_sq, Tensor step,
           Tensor grad_scale, Tensor found_inf, double lr, double beta1, double beta2, double eps,
           double weight_decay) {
  checks::expect_cpu("adamw_", "param", param);
  const Type type = storage_type("adamw_", "param", param);
  if (master.has_value() == (type == Type::fp32)) {
    checks::fail("spu::adamw_: a 16-bit param needs an fp32 master and an fp32 param has none; param is ",
                 checks::name(param.scalar_type()), master.has_value() ? " with a master" : " without one");
  }
  expect_state("grad", grad, param);
  expect_state("exp_avg", exp_avg, param);
  expect_state("exp_avg_sq", exp_avg_sq, param);
  if (master.has_value()) expect_state("master", *master, param);
  checks::expect_scalar("adamw_", "step", step);
  checks::expect_scalar("adamw_", "grad_scale", grad_scale);
  checks::expect_scalar("adamw_", "found_inf", found_inf);
  if (value(found_inf) != 0.0f) return;

  Writable copy(param), m(exp_avg), v(exp_avg_sq), fp32(master.has_value() ? *master : param);
  const Tensor g = dense(grad);
  const float* gradient = static_cast<const float*>(g.const_data_ptr());
  void* out = master.has_value() ? copy.data<void>() : nullptr;
  const math::AdamWStep k = step_of(value(step), lr, beta1, beta2, eps, weight_decay);
  const float scale = value(grad_scale);
  const KernelTable& table = kernels();
  for_ranges(param.numel(), kGrain, [&](int64_t begin, int64_t end) {
    table.adamw(type, out, fp32.data<float>(), gradient, m.data<float>(), v.data<float>(), scale, k, begin, end);
  });
  m.finish();
  v.finish();
  fp32.finish();
  if (master.has_value()) copy.finish();
}

// Partial sums over pieces of a fixed size are added in order: the result depends on no thread count.
Tensor grad_sqnorm(Tensor grad) {
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
  Tensor out = new_empty(grad, {1}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(total);
  return out;
}

}  // namespace cpu
}  // namespace spu
