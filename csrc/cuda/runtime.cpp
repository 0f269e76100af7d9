// Device and stream of an op, by this library's own (static) CUDA runtime and torch's idea of the current stream.
#include "cuda/runtime.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "torch/checks.h"

namespace spu::cuda {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// torch's C function for the current CUDA stream. It lives in libtorch_cuda, which a CPU build of torch does not have:
// linking to it would keep this library from loading there, so it is looked up at the first launch, which only a
// torch with CUDA can ask for.
CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) throw std::runtime_error("spu._cuda: this torch has no CUDA streams; it is a CPU build");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

}  // namespace

cudaStream_t torch_stream(int device) {
  void* stream = nullptr;
  if (current_stream()(device, &stream) != 0) throw std::runtime_error("spu._cuda: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// torch's guard, not our runtime, restores the device: the runtimes share a thread's current context, and only torch's
// must know which device it had.
OnDevice::OnDevice(const torch::stable::Tensor& t)
    : guard_(std::make_unique<torch::stable::accelerator::DeviceGuard>(t.get_device_index())),
      index_(t.get_device_index()) {
  check(cudaSetDevice(index_), "cudaSetDevice");
  stream_ = torch_stream(index_);
}

OnDevice::~OnDevice() = default;

int OnDevice::capability() const {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

}  // namespace spu::cuda
