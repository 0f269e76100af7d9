// The arguments of spu::adamw_, checked and made dense: the same for both libraries.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "math/masters.h"
#include "math/moments.h"
#include "torch/checks.h"

namespace spu::lists {

// Dense stand-ins for the tensors of a call that are not; finish() writes back those that were to be changed.
class Dense {
 public:
  void* writable(const Tensor& t) {
    if (t.is_contiguous()) return t.mutable_data_ptr();
    copies_.push_back({t, torch::stable::contiguous(t)});
    return copies_.back().second.mutable_data_ptr();
  }
  const void* readable(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }
  void finish() {
    for (auto& [target, copy] : copies_) torch::stable::copy_(target, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<Tensor> kept_;
};

struct AdamWLists {
  const std::vector<Tensor>&params, &grads, &masters, &exp_avgs, &exp_avg_sqs, &steps;
};

struct AdamWCall {
  math::Moments moments;
  math::Master kept;
  std::vector<math::AdamWItem> items;
};

namespace detail {

inline void expect_length(const char* what, const std::vector<Tensor>& list, size_t wanted) {
  if (list.size() != wanted) {
    checks::fail("spu::adamw_: ", what, " has ", list.size(), " tensors for ", wanted, " parameters");
  }
}

inline void expect_like(const char* what, const Tensor& t, const Tensor& param, ScalarType dtype) {
  checks::expect_dtype("adamw_", what, t, dtype);
  checks::expect_same_shape("adamw_", what, t, "param", param);
}

inline math::Moments moments_of(const Tensor& exp_avg) {
  switch (exp_avg.scalar_type()) {
    case ScalarType::Float:
      return math::Moments::fp32;
    case ScalarType::BFloat16:
      return math::Moments::bf16;
    case ScalarType::Byte:
      return math::Moments::int8;
    default:
      checks::fail("spu::adamw_: exp_avg must be float32, bfloat16 or uint8, got ",
                   checks::name(exp_avg.scalar_type()));
  }
}

inline math::Master master_of(const Tensor& master) {
  switch (master.scalar_type()) {
    case ScalarType::Float:
      return math::Master::fp32;
    case ScalarType::Short:
      return math::Master::bits16;
    case ScalarType::Char:
      return math::Master::bits8;
    default:
      checks::fail("spu::adamw_: a master must be float32, a correction int16 or int8, got ",
                   checks::name(master.scalar_type()));
  }
}

inline void expect_moment(const char* what, const Tensor& t, const Tensor& param, const Tensor& first) {
  if (first.scalar_type() != ScalarType::Byte) return expect_like(what, t, param, first.scalar_type());
  checks::expect_dtype("adamw_", what, t, ScalarType::Byte);
  const int64_t bytes = math::moment_bytes(param.numel());
  if (t.numel() != bytes || !t.is_contiguous()) {
    checks::fail("spu::adamw_: the 8-bit ", what, " of ", param.numel(), " values is one buffer of ", bytes,
                 " bytes, got ", checks::shape(t));
  }
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 != 0) {
    checks::fail("spu::adamw_: the 8-bit ", what, " does not start at a multiple of 4 bytes; clone it");
  }
}

}  // namespace detail

// expect_device(what, tensor) and expect_scalar(what, tensor) throw for a tensor that is not where the kernels run.
template <class ExpectDevice, class ExpectScalar>
AdamWCall adamw_call(const AdamWLists& lists, Dense& dense, const ExpectDevice& expect_device,
                     const ExpectScalar& expect_scalar) {
  const std::vector<Tensor>& params = lists.params;
  const bool half = !lists.masters.empty();
  detail::expect_length("grads", lists.grads, params.size());
  detail::expect_length("masters", lists.masters, half ? params.size() : 0);
  detail::expect_length("exp_avgs", lists.exp_avgs, params.size());
  detail::expect_length("exp_avg_sqs", lists.exp_avg_sqs, params.size());
  detail::expect_length("steps", lists.steps, params.size());
  AdamWCall call = {params.empty() ? math::Moments::fp32 : detail::moments_of(lists.exp_avgs[0]),
                    params.empty() || !half ? math::Master::fp32 : detail::master_of(lists.masters[0]),
                    {}};
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor &param = params[i], &grad = lists.grads[i], &first = lists.exp_avgs[i];
    const Tensor &second = lists.exp_avg_sqs[i], &target = half ? lists.masters[i] : param;
    expect_device("param", param);
    checks::expect_same_dtype("adamw_", "param", param, "the first param", params[0]);
    const ScalarType type = param.scalar_type();
    if (half ? type != ScalarType::Half && type != ScalarType::BFloat16 : type != ScalarType::Float) {
      checks::fail("spu::adamw_: a 16-bit param needs a master or a correction, an fp32 param has none; param is ",
                   checks::name(type), half ? " with a master" : " without one");
    }
    expect_device("grad", grad);
    expect_device("exp_avg", first);
    expect_device("exp_avg_sq", second);
    expect_device("master", target);
    const bool narrow = lists.grads[0].scalar_type() == ScalarType::BFloat16;
    detail::expect_like("grad", grad, param, narrow ? ScalarType::BFloat16 : ScalarType::Float);
    detail::expect_like("master", target, param, half ? lists.masters[0].scalar_type() : ScalarType::Float);
    detail::expect_moment("exp_avg", first, param, lists.exp_avgs[0]);
    detail::expect_moment("exp_avg_sq", second, param, lists.exp_avgs[0]);
    expect_scalar("step", lists.steps[i]);
    call.items.push_back({half ? dense.writable(param) : nullptr, dense.writable(target), dense.readable(grad),
                          dense.writable(first), dense.writable(second),
                          static_cast<const float*>(lists.steps[i].const_data_ptr()), param.numel()});
  }
  return call;
}

}  // namespace spu::lists
