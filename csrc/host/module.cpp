// spu._host: the simulator that planning runs for every placement it tries, and checksums of memory. No tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "crc32c.h"
#include "simulate.h"

namespace py = pybind11;

namespace {

using Integers = std::vector<std::int64_t>;
using Seconds = std::vector<double>;

std::pair<Seconds, Seconds> simulate(Integers first, Integers stages, Integers kinds, Integers microbatches,
                                     Seconds seconds, Seconds transfers) {
  const spu::host::FlatSchedule schedule{std::move(first),        std::move(stages),  std::move(kinds),
                                         std::move(microbatches), std::move(seconds), std::move(transfers)};
  spu::host::Times times;
  {
    py::gil_scoped_release release;
    times = spu::host::simulate(schedule);
  }
  return {std::move(times.starts), std::move(times.ends)};
}

using Crc = std::uint32_t (*)(const unsigned char*, std::size_t, std::uint32_t);

template <Crc crc>
std::uint32_t checksum(const py::buffer& data, std::uint32_t before) {
  // Not data.request(): that would take strided memory too.
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  std::uint32_t found;
  {
    py::gil_scoped_release release;
    found = crc(static_cast<const unsigned char*>(view.buf), static_cast<std::size_t>(view.len), before);
  }
  PyBuffer_Release(&view);
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The C++ twin of spu.schedules.simulate, and CRC-32C.";
  m.def("simulate", &simulate, py::arg("first"), py::arg("stages"), py::arg("kinds"), py::arg("microbatches"),
        py::arg("seconds"), py::arg("transfers"),
        "(starts, ends) in seconds of every action of a flat schedule, NaN for those that can never start; the same "
        "bits as spu.schedules.simulate.run_flat. Raises ValueError for arrays that do not fit together.");
  m.def("crc32c", &checksum<spu::host::crc32c>, py::arg("data"), py::arg("before") = 0,
        "The CRC-32C of contiguous bytes that follow others whose CRC-32C is `before`; the interpreter's lock is "
        "released. Raises BufferError or ValueError for memory that is not contiguous.");
  m.def("crc32c_by_tables", &checksum<spu::host::crc32c_by_tables>, py::arg("data"), py::arg("before") = 0,
        "The same without the processor's instruction.");
}
