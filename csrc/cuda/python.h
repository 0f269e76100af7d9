// Functions of the Python module that are defined outside module.cpp.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace spu::cuda {

PyObject* python_multiply(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* python_cublaslt(PyObject* module, PyObject* nothing);
PyObject* python_plans(PyObject* module, PyObject* nothing);

}  // namespace spu::cuda
