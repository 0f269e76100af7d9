// spu._cuda: registers the CUDA implementations of the ops that spu.ops.schema defines. Loaded by `import spu._cuda` or
// by torch.ops.load_library, with or without a GPU: nothing of CUDA is called before the first op.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cuda/gemm.h"
#include "cuda/ops.h"
#include "cuda/python.h"

#ifdef SPU_HOST_SIM
#define SPU_KEY CPU
#else
#define SPU_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(spu, SPU_KEY, m) {
  spu::cuda::register_shared(m);
  SPU_IMPL(m, "pack_", spu::cuda::pack_into);
  SPU_IMPL(m, "unpack_", spu::cuda::unpack_into);
  SPU_IMPL(m, "copy_in_", spu::cuda::copy_in);
  SPU_IMPL(m, "mlp_dz", spu::cuda::mlp_dz);
}

namespace {

#ifndef SPU_CUDA_ARCHS
#define SPU_CUDA_ARCHS "simulated"
#endif

PyObject* architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(SPU_CUDA_ARCHS);
}

PyObject* set_tiles(PyObject*, PyObject* arguments) {
  int capability = 0;
  const char* values = nullptr;
  Py_ssize_t count = 0;
  if (!PyArg_ParseTuple(arguments, "iy#", &capability, &values, &count)) return nullptr;
  if (!spu::cuda::set_tiles(capability, reinterpret_cast<const uint8_t*>(values), count)) {
    PyErr_Format(PyExc_ValueError, "set_tiles: capability %d, or one of %zd tiles, is out of range", capability, count);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* shape_class(PyObject*, PyObject* arguments) {
  long long m = 0, n = 0, k = 0;
  if (!PyArg_ParseTuple(arguments, "LLL", &m, &n, &k)) return nullptr;
  return PyLong_FromLong(static_cast<long>(spu::cuda::shape_class(m, n, k)));
}

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS,
     "architectures() -> str: what the kernels were compiled for, as SPU_CUDA_ARCHS named it."},
    {"set_tiles", set_tiles, METH_VARARGS,
     "set_tiles(capability: int, tiles: bytes): the tile, 0 large, 1 small or 2 cuBLASLt, of each form (forward, dx, "
     "dw), type "
     "(fp16, bf16) and shape class, in this order, on devices of a capability (10 * major + minor)."},
    {"shape_class", shape_class, METH_VARARGS,
     "shape_class(rows, columns, inner) -> int: the index of a product's class in spu.kernels.table.CLASSES."},
    {"cublaslt", spu::cuda::python_cublaslt, METH_NOARGS,
     "cublaslt() -> int | str: the version of the cuBLASLt that torch has loaded, or why there is none to be used."},
    {"cublaslt_plans", spu::cuda::python_plans, METH_NOARGS,
     "cublaslt_plans() -> int: for how many products an algorithm was looked for and is kept."},
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(spu::cuda::python_multiply)), METH_FASTCALL,
     "multiply(device, form, type, m, n, k, a, a_row, a_col, b, b_row, b_col, out, bias, preact, act, inv_scale, "
     "found_inf, accumulate, algorithm) -> bool: a product by cuBLASLt on the current device and stream, all of it "
     "integers: "
     "addresses (0: none), strides in elements, form 0 forward, 1 dx (preact is what the activation was taken of, "
     "whose "
     "derivative multiplies the product), 2 dw (out is main_grad), type 0 fp16, 1 bf16; "
     "algorithm 0 is the "
     "best that cuBLASLt proposes, 1 the second. "
     "False: cuBLASLt takes no such product; nothing was launched."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cuda",
                          "The CUDA kernels of spu, registered with torch.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda(void) {
  return PyModule_Create(&definition);
}
