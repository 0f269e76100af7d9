// The simulated device: no stream, no tensor cores.
#include "cuda/runtime.h"

namespace spu::cuda {

cudaStream_t torch_stream(int) {
  return nullptr;
}

OnDevice::OnDevice(const torch::stable::Tensor&) : index_(0) {}
OnDevice::~OnDevice() = default;
int OnDevice::capability() const {
  return 0;
}

}  // namespace spu::cuda
