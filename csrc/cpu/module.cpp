// spu._C: registers the CPU implementations of the ops that spu.ops.schema defines. Loaded by `import spu._C` or by
// torch.ops.load_library; both run the static registration below. Python finds isa() on the module.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/attention.h"
#include "cpu/codec.h"
#include "cpu/cross_entropy.h"
#include "cpu/gated.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/optim.h"

STABLE_TORCH_LIBRARY_IMPL(spu, CPU, m) {
  m.impl("linear.cpu", TORCH_BOX(&spu::cpu::linear));
  m.impl("linear_dz.cpu", TORCH_BOX(&spu::cpu::linear_dz));
  m.impl("linear_dx.cpu", TORCH_BOX(&spu::cpu::linear_dx));
  m.impl("linear_dw.cpu", TORCH_BOX(&spu::cpu::linear_dw));
  m.impl("linear_db.cpu", TORCH_BOX(&spu::cpu::linear_db));
  m.impl("linear_dw_.cpu", TORCH_BOX(&spu::cpu::linear_dw_sink));
  m.impl("linear_db_.cpu", TORCH_BOX(&spu::cpu::linear_db_sink));
  m.impl("unscale_.cpu", TORCH_BOX(&spu::cpu::unscale));
  m.impl("gated_linear.cpu", TORCH_BOX(&spu::cpu::gated_linear));
  m.impl("gated_dz.cpu", TORCH_BOX(&spu::cpu::gated_dz));
  m.impl("gated_dx.cpu", TORCH_BOX(&spu::cpu::gated_dx));
  m.impl("attention.cpu", TORCH_BOX(&spu::cpu::attention));
  m.impl("attention_backward.cpu", TORCH_BOX(&spu::cpu::attention_backward));
  m.impl("linear_ce.cpu", TORCH_BOX(&spu::cpu::linear_ce));
  m.impl("linear_ce_dz.cpu", TORCH_BOX(&spu::cpu::linear_ce_dz));
  m.impl("pack.cpu", TORCH_BOX(&spu::cpu::pack));
  m.impl("unpack.cpu", TORCH_BOX(&spu::cpu::unpack));
  m.impl("adamw_.cpu", TORCH_BOX(&spu::cpu::adamw));
  m.impl("grad_sqnorm.cpu", TORCH_BOX(&spu::cpu::grad_sqnorm));
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
