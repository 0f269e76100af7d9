// spu._cuda.multiply: one product by cuBLASLt for spu.kernels, whose plan has checked the operands. A plain function
// with addresses, because an op with 20 arguments costs more than the launch.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/gemm_library.h"
#include "cuda/python.h"
#include "cuda/runtime.h"

namespace spu::cuda {
namespace {

// Memory on the current device.
class DeviceScratch final : public Scratch {
 public:
  explicit DeviceScratch(int device) : device_(device) {}
  void* bytes(int64_t count) override {
#ifdef SPU_HOST_SIM
    const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
#else
    const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, device_);
#endif
    const torch::headeronly::IntHeaderOnlyArrayRef size(&count, 1);
    held_.push_back(torch::stable::empty(size, torch::headeronly::ScalarType::Byte, std::nullopt, device));
    return held_.back().mutable_data_ptr();
  }

 private:
  [[maybe_unused]] int device_;
  std::vector<torch::stable::Tensor> held_;
};

constexpr Py_ssize_t kArguments = 20;

Gemm product_of(const int64_t* v) {
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); };
  Gemm g = {static_cast<Form>(v[1]),     static_cast<Type>(v[2]),      v[3], v[4], v[5],
            {pointer(v[6]), v[7], v[8]}, {pointer(v[9]), v[10], v[11]}};
  if (g.form == Form::dw) {
    g.main_grad = static_cast<float*>(pointer(v[12]));
    g.inv_scale = static_cast<const float*>(pointer(v[16]));
    g.found_inf = static_cast<float*>(pointer(v[17]));
    g.accumulate = v[18] != 0;
  } else {
    g.out = pointer(v[12]);
    g.bias = pointer(v[13]);
    if (g.form == Form::dx) {
      g.saved = pointer(v[14]);
    } else {
      g.preact = pointer(v[14]);
    }
    g.act = static_cast<math::Act>(v[15]);
  }
  return g;
}

}  // namespace

PyObject* python_multiply(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_Format(PyExc_TypeError, "multiply takes %zd integers, got %zd", kArguments, count);
    return nullptr;
  }
  int64_t values[kArguments];
  for (Py_ssize_t i = 0; i < kArguments; ++i) {
    values[i] = PyLong_AsLongLong(arguments[i]);
    if (values[i] == -1 && PyErr_Occurred() != nullptr) return nullptr;
  }
  const auto in = [&](int i, int64_t end) { return values[i] >= 0 && values[i] < end; };
  if (!in(1, kForms) || !in(2, kTensorCoreTypes + 1) || !in(15, static_cast<int64_t>(math::Act::silu) + 1) ||
      !in(19, 1 << 16)) {
    PyErr_SetString(PyExc_ValueError, "multiply: form, type, activation or algorithm is out of range");
    return nullptr;
  }
  bool launched = false;
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    const int device = static_cast<int>(values[0]);
    DeviceScratch scratch(device);
    const int algorithm = static_cast<int>(values[19]);
    launched = launch_gemm_library(product_of(values), torch_stream(device), scratch, algorithm);
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  return PyBool_FromLong(launched);
}

PyObject* python_cublaslt(PyObject*, PyObject*) {
  const lt::Library* library = lt::cublaslt();
  if (library == nullptr) return PyUnicode_FromString(lt::absent().c_str());
  return PyLong_FromSize_t(library->version());
}

PyObject* python_plans(PyObject*, PyObject*) {
  return PyLong_FromSize_t(library_plans());
}

}  // namespace spu::cuda
