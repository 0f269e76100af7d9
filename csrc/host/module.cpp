// spu._host: the simulator that planning runs for every placement it tries. Touches no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The C++ twin of spu.schedules.simulate.";
  m.def("simulate", &simulate, py::arg("first"), py::arg("stages"), py::arg("kinds"), py::arg("microbatches"),
        py::arg("seconds"), py::arg("transfers"),
        "(starts, ends) in seconds of every action of a flat schedule, NaN for those that can never start; the same "
        "bits as spu.schedules.simulate.run_flat. Raises ValueError for arrays that do not fit together.");
}
