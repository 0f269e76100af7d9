// spu._C: registers the CPU implementations of the ops that spu.ops.schema defines. Loaded by `import spu._C` or by
// torch.ops.load_library; both run the static registration below. Python finds isa() on the module.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/borrow.h"
#include "cpu/help.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/products.h"

STABLE_TORCH_LIBRARY_IMPL(spu, CPU, m) {
  spu::cpu::register_shared(m);
  SPU_IMPL(m, "linear_add", spu::cpu::linear_add);
  SPU_IMPL(m, "linear_each", spu::cpu::linear_each);
  SPU_IMPL(m, "linear_dw_each_", spu::cpu::linear_dw_each);
  SPU_IMPL(m, "gated_mlp", spu::cpu::gated_mlp);
  SPU_IMPL(m, "gated_mlp_add", spu::cpu::gated_mlp_add);
  SPU_IMPL(m, "gated_dh", spu::cpu::gated_dh);
  SPU_IMPL(m, "gated_dx", spu::cpu::gated_dx);
  SPU_IMPL(m, "experts_order", spu::cpu::experts_order);
  SPU_IMPL(m, "experts_mlp", spu::cpu::experts_mlp);
  SPU_IMPL(m, "experts_dh", spu::cpu::experts_dh);
  SPU_IMPL(m, "experts_dx", spu::cpu::experts_dx);
  SPU_IMPL(m, "experts_dw", spu::cpu::experts_dw);
  SPU_IMPL(m, "experts_dw_", spu::cpu::experts_dw_sink);
  SPU_IMPL(m, "rows_sum", spu::cpu::rows_sum);
  SPU_IMPL(m, "rows_dot", spu::cpu::rows_dot);
  SPU_IMPL(m, "mlp_dz", spu::cpu::mlp_dz);
  SPU_IMPL(m, "linear_ce", spu::cpu::linear_ce);
  SPU_IMPL(m, "linear_ce_and_dz_", spu::cpu::linear_ce_and_dz_into);
  SPU_IMPL(m, "linear_ce_dz", spu::cpu::linear_ce_dz);
  SPU_IMPL(m, "attention", spu::cpu::attention);
  SPU_IMPL(m, "attention_backward", spu::cpu::attention_backward);
  SPU_IMPL(m, "rms_norm", spu::cpu::rms_norm);
  SPU_IMPL(m, "rms_norm_to", spu::cpu::rms_norm_to);
  SPU_IMPL(m, "rms_norm_backward", spu::cpu::rms_norm_backward);
  SPU_IMPL(m, "layer_norm", spu::cpu::layer_norm);
  SPU_IMPL(m, "layer_norm_backward", spu::cpu::layer_norm_backward);
  SPU_IMPL(m, "copy_in_", spu::cpu::copy_in);
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

// The type named "bf16" or "fp16"; an exception, and false, for any other.
bool tile_type(const char* name, spu::Type* type) {
  const std::string asked = name;
  *type = asked == "fp16" ? spu::Type::fp16 : spu::Type::bf16;
  if (asked == "fp16" || asked == "bf16") return true;
  PyErr_Format(PyExc_ValueError, "tiles multiply bf16 and fp16, not %s", name);
  return false;
}

PyObject* tile_rule(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  spu::Type type;
  if (!PyArg_ParseTuple(arguments, "s", &name) || !tile_type(name, &type)) return nullptr;
  const spu::cpu::TileRule rule = spu::cpu::tile_rule(type);
  return Py_BuildValue("(LLL)", static_cast<long long>(rule.rows), static_cast<long long>(rule.columns),
                       static_cast<long long>(rule.depth));
}

PyObject* set_tile_rule(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  spu::Type type;
  long long rows, columns, depth;
  if (!PyArg_ParseTuple(arguments, "sLLL", &name, &rows, &columns, &depth) || !tile_type(name, &type)) return nullptr;
  if (rows < 1 || columns < 1 || depth < 1) {
    return PyErr_Format(PyExc_ValueError, "a tile rule's sizes must be positive, got (%lld, %lld, %lld)", rows, columns,
                        depth);
  }
  spu::cpu::set_tile_rule(type, {rows, columns, depth});
  Py_RETURN_NONE;
}

PyObject* set_way(PyObject*, PyObject* arguments) {
  const char *op, *type, *shape_class, *way;
  if (!PyArg_ParseTuple(arguments, "ssss", &op, &type, &shape_class, &way)) return nullptr;
  return PyBool_FromLong(spu::cpu::set_way(op, type, shape_class, way));
}

PyObject* way(PyObject*, PyObject* arguments) {
  const char *op, *type;
  long long m, n, k;
  if (!PyArg_ParseTuple(arguments, "ssLLL", &op, &type, &m, &n, &k)) return nullptr;
  const char* found = spu::cpu::way_of(op, type, m, n, k);
  if (!found) return PyErr_Format(PyExc_ValueError, "no product %s of %s", op, type);
  return PyUnicode_FromString(found);
}

PyObject* rings(PyObject*, PyObject*) {
  return PyLong_FromUnsignedLong(spu::cpu::rings());
}

PyObject* ring(PyObject*, PyObject*) {
  spu::cpu::ring();
  Py_RETURN_NONE;
}

PyObject* help_until(PyObject*, PyObject* more_than) {
  const unsigned long seen = PyLong_AsUnsignedLong(more_than);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS spu::cpu::help_until(static_cast<uint32_t>(seen));
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

PyObject* helped(PyObject*, PyObject*) {
  return PyLong_FromLongLong(spu::cpu::helped());
}

PyObject* lend_cores(PyObject*, PyObject* arguments) {
  unsigned long long words, count;
  if (!PyArg_ParseTuple(arguments, "KK", &words, &count)) return nullptr;
  spu::cpu::lend_cores(reinterpret_cast<spu::cpu::CoreWord*>(words), static_cast<int64_t>(count));
  Py_RETURN_NONE;
}

PyObject* take_cores_back(PyObject*, PyObject* arguments) {
  unsigned long long words, count;
  if (!PyArg_ParseTuple(arguments, "KK", &words, &count)) return nullptr;
  Py_BEGIN_ALLOW_THREADS spu::cpu::take_cores_back(reinterpret_cast<spu::cpu::CoreWord*>(words),
                                                   static_cast<int64_t>(count));
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

PyObject* borrow_core(PyObject*, PyObject* arguments) {
  unsigned long long word;
  int core;
  if (!PyArg_ParseTuple(arguments, "Ki", &word, &core)) return nullptr;
  return PyBool_FromLong(spu::cpu::borrow_core(reinterpret_cast<spu::cpu::CoreWord*>(word), core));
}

PyObject* borrow_no_more(PyObject*, PyObject*) {
  Py_BEGIN_ALLOW_THREADS spu::cpu::borrow_no_more();
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "isa() -> str: the instruction set in use: 'amx', 'avx512bf16', 'avx512', 'avx2' or 'scalar'. SPU_CPU_ISA forces "
     "one."},
    {"tile_rule", tile_rule, METH_VARARGS,
     "tile_rule(dtype) -> (rows, columns, depth): the least product of 'bf16' or 'fp16' operands that the kernels of "
     "'amx' give to tiles; what is smaller in one dimension is the AVX-512 kernel's."},
    {"set_tile_rule", set_tile_rule, METH_VARARGS,
     "set_tile_rule(dtype, rows, columns, depth): change tile_rule for this process, also while products run."},
    {"set_way", set_way, METH_VARARGS,
     "set_way(op, dtype, shape_class, way) -> bool: whose kernels multiply: '' the chosen ones, an instruction set's, "
     "or "
     "'torch'. False if that cannot be here. For all threads."},
    {"way", way, METH_VARARGS, "way(op, dtype, rows, columns, inner) -> str: the way in use for a product."},
    {"rings", rings, METH_NOARGS, "rings() -> int: how often ring() was called, modulo 2**32."},
    {"ring", ring, METH_NOARGS, "ring(): wake the threads in help_until."},
    {"help_until", help_until, METH_O,
     "help_until(seen): take part in the products of other threads until rings() is not `seen`."},
    {"helped", helped, METH_NOARGS, "helped() -> int: pieces of work that threads in help_until have done so far."},
    {"lend_cores", lend_cores, METH_VARARGS,
     "lend_cores(address, count): let other processes have this one's cores while it waits. Each has a uint32, 0 at "
     "first, in memory that the processes share; `address` is the first one's."},
    {"take_cores_back", take_cores_back, METH_VARARGS,
     "take_cores_back(address, count): end lend_cores(); returns when who has a core has ended its piece of work."},
    {"borrow_core", borrow_core, METH_VARARGS,
     "borrow_core(address, core) -> bool: divide products with this core of another process too, while it is lent. The "
     "memory must stay. False, and nothing done, where there are 64 already, or the system is not Linux."},
    {"borrow_no_more", borrow_no_more, METH_NOARGS, "borrow_no_more(): end what borrow_core() began."},
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
