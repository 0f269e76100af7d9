// spu._host: the simulator that planning runs for every placement it tries, checksums, and transfers of files with
// them. Touches no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "crc32c.h"
#include "simulate.h"
#include "transfer.h"

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

// Contiguous memory of a Python object, held for a while. Not py::buffer_info: that would take strided memory too.
class Held {
 public:
  Held(const py::buffer& data, bool writable) {
    if (PyObject_GetBuffer(data.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  ~Held() { PyBuffer_Release(&view_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

using Crc = std::uint32_t (*)(const unsigned char*, std::size_t, std::uint32_t);

template <Crc crc>
std::uint32_t checksum(const py::buffer& data, std::uint32_t before) {
  const Held held(data, false);
  py::gil_scoped_release release;
  return crc(held.data(), held.size(), before);
}

template <bool kWrite>
std::pair<std::size_t, std::uint32_t> transfer(int fd, const py::buffer& data, std::int64_t at, std::size_t block) {
  if (block == 0) throw std::invalid_argument("a block of 0 bytes");
  const Held held(data, !kWrite);
  spu::host::Transfer found;
  {
    py::gil_scoped_release release;
    if constexpr (kWrite) {
      found = spu::host::write_at(fd, held.data(), held.size(), at, block);
    } else {
      found = spu::host::read_at(fd, held.data(), held.size(), at, block);
    }
  }
  if (found.error != 0) {
    errno = found.error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return {found.done, found.sum};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The C++ twin of spu.schedules.simulate, CRC-32C, and transfers of files.";
  m.def("simulate", &simulate, py::arg("first"), py::arg("stages"), py::arg("kinds"), py::arg("microbatches"),
        py::arg("seconds"), py::arg("transfers"),
        "(starts, ends) in seconds of every action of a flat schedule, NaN for those that can never start; the same "
        "bits as spu.schedules.simulate.run_flat. Raises ValueError for arrays that do not fit together.");
  m.def("crc32c", &checksum<spu::host::crc32c>, py::arg("data"), py::arg("before") = 0,
        "The CRC-32C of contiguous bytes that follow others whose CRC-32C is `before`; the interpreter's lock is "
        "released. Raises BufferError or ValueError for memory that is not contiguous.");
  m.def("crc32c_by_tables", &checksum<spu::host::crc32c_by_tables>, py::arg("data"), py::arg("before") = 0,
        "The same without the processor's instruction.");
  m.def("read_at", &transfer<false>, py::arg("fd"), py::arg("data"), py::arg("at"), py::arg("block"),
        "Fill `data` from a file's byte `at` on, each call to the system at a multiple of `block` bytes from there; "
        "the interpreter's lock is released. Returns (bytes read, their CRC-32C): fewer bytes than asked for where the "
        "file gives no more. Raises OSError.");
  m.def("write_at", &transfer<true>, py::arg("fd"), py::arg("data"), py::arg("at"), py::arg("block"),
        "Write `data` likewise. Returns (bytes written, their CRC-32C). Raises OSError.");
}
