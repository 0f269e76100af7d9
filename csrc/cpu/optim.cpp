// spu::adamw_ and spu::grad_sqnorm.
#include "cpu/ops.h"

#include <algorithm>

#include "cpu/tensors.h"
#include "torch/adamw.h"

namespace spu::cpu {
namespace {

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

}  // namespace

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> masters,
           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, Tensor grad_scale,
           Tensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay) {
  lists::Dense dense;
  const lists::AdamWCall call = lists::adamw_call(
      {params, grads, masters, exp_avgs, exp_avg_sqs, steps}, dense,
      [](const char* what, const Tensor& t) { checks::expect_cpu("adamw_", what, t); },
      [](const char* what, const Tensor& t) { checks::expect_scalar("adamw_", what, t); });
  checks::expect_scalar("adamw_", "grad_scale", grad_scale);
  checks::expect_scalar("adamw_", "found_inf", found_inf);
  if (params.empty() || value(found_inf) != 0.0f) return;
  const Type type = storage_type("adamw_", "param", params[0]);
  const Type grad_type = storage_type("adamw_", "grad", grads[0]);
  const KernelTable& table = kernels();
  for (const math::AdamWItem& item : call.items) {
    const math::AdamWStep k = math::adamw_constants(*item.step, lr, beta1, beta2, eps, weight_decay);
    const AdamWRange range = {
        item, type, grad_type, call.moments, call.kept, value(grad_scale), math::moment_seed(*item.step)};
    const int64_t blocks = (item.numel + math::kMomentBlock - 1) / math::kMomentBlock;
    for_ranges(blocks, kGrain / math::kMomentBlock,
               [&](int64_t begin, int64_t end) { table.adamw(range, k, begin, end); });
  }
  dense.finish();
}

Tensor grad_sqnorm(std::vector<Tensor> grads) {
  if (grads.empty()) checks::fail("spu::grad_sqnorm: no gradients; the sum of none is 0");
  double total = 0;
  for (const Tensor& grad : grads) total += square_sum(grad);
  Tensor out = new_empty(grads[0], {1}, ScalarType::Double);  // fp32 ends at norms of 1.8e19
  *static_cast<double*>(out.mutable_data_ptr()) = total;
  return out;
}

}  // namespace spu::cpu
