// spu::copy_in_: passes between fp32 and the 16-bit types. torch's own take an element at a time through its casting
// loops, or AVX2's conversion.
#include "cpu/ops.h"

#include "cpu/tensors.h"

namespace spu::cpu {
namespace {

bool is_storage(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float;
}

// Whether a pass of ours makes the copy: everything else is torch's, equal types among it.
bool converts(const Tensor& source, const Tensor& target) {
  return source.is_cpu() && target.is_cpu() && source.scalar_type() != target.scalar_type() && is_storage(source) &&
         is_storage(target) && source.is_contiguous() && target.is_contiguous();
}

}  // namespace

void copy_in(std::vector<Tensor> sources, std::vector<Tensor> targets) {
  const char* op = "copy_in_";
  if (sources.size() != targets.size()) {
    checks::fail("spu::", op, ": ", sources.size(), " sources for ", targets.size(), " targets");
  }
  const KernelTable& k = kernels();
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor& source = sources[i];
    Tensor& target = targets[i];
    checks::expect_same_shape(op, "source", source, "target", target);
    if (!converts(source, target)) {
      torch::stable::copy_(target, source);
      continue;
    }
    const Type from = storage_type(op, "source", source), to = storage_type(op, "target", target);
    const void* src = source.const_data_ptr();
    void* dst = target.mutable_data_ptr();
    for_ranges(source.numel(), kGrain, [&](int64_t begin, int64_t end) { k.convert(from, src, to, dst, begin, end); });
  }
}

}  // namespace spu::cpu
