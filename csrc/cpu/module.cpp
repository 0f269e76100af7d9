// spu._C: registers the CPU implementations of the ops that spu.ops.schema defines. Loaded by `import spu._C` or by
// torch.ops.load_library; both run the static registration below. Python finds isa() on the module.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(spu, CPU, m) {
  spu::cpu::register_shared(m);
  SPU_IMPL(m, "gated_dx", spu::cpu::gated_dx);
  SPU_IMPL(m, "mlp_dz", spu::cpu::mlp_dz);
  SPU_IMPL(m, "linear_ce", spu::cpu::linear_ce);
  SPU_IMPL(m, "linear_ce_dz", spu::cpu::linear_ce_dz);
  SPU_IMPL(m, "attention", spu::cpu::attention);
  SPU_IMPL(m, "attention_backward", spu::cpu::attention_backward);
  SPU_IMPL(m, "rms_norm", spu::cpu::rms_norm);
  SPU_IMPL(m, "rms_norm_backward", spu::cpu::rms_norm_backward);
  SPU_IMPL(m, "layer_norm", spu::cpu::layer_norm);
  SPU_IMPL(m, "layer_norm_backward", spu::cpu::layer_norm_backward);
  SPU_IMPL(m, "embedding_dw_", spu::cpu::embedding_dw_sink);
  SPU_IMPL(m, "rotary", spu::cpu::rotary);
}

namespace {

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(spu::cpu::kernels().name);
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "isa() -> str: the instruction set in use, 'avx512', 'avx2' or 'scalar' (SPU_CPU_ISA forces a narrower one)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "The CPU kernels of spu, registered with torch.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&definition);
}
