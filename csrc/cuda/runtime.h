// The device that an op runs on: torch's current stream there, and the facts that choose kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "cuda/device.h"

namespace spu::cuda {

// Torch's current stream on a device.
cudaStream_t torch_stream(int device);

// Makes the tensor's device current for the life of the object; ops launch on stream().
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }
  int capability() const;  // 10 * major + minor

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  int index_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace spu::cuda
