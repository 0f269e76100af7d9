// spu._host: the host-side searches and simulators that planning needs. Touches no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "place.h"
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

// A Problem from the Python tuple of the same fields.
spu::host::Problem read_problem(const py::tuple& fields) {
  std::size_t next = 0;
  const auto number = [&] { return fields[next++].cast<std::int64_t>(); };
  const auto integers = [&] { return fields[next++].cast<Integers>(); };
  const auto seconds = [&] { return fields[next++].cast<Seconds>(); };
  spu::host::Problem p;
  p.layers = number(), p.stages = number(), p.recompute = number();
  p.forward = seconds(), p.backward = seconds();
  p.fixed = integers(), p.own = integers(), p.inner = integers(), p.inner_again = integers();
  p.extra = integers(), p.extra_again = integers();
  p.in_flight = integers(), p.budgets = integers();
  p.enter_fixed = integers(), p.enter_each = integers(), p.enter_again = integers();
  p.leave_fixed = integers(), p.leave_each = integers(), p.leave_extra = integers();
  p.enter_s = seconds(), p.leave_s = seconds();
  return p;
}

std::vector<Integers> place(const py::tuple& fields, const Seconds& slacks) {
  const spu::host::Problem problem = read_problem(fields);
  py::gil_scoped_release release;
  return spu::host::place(problem, slacks);
}

Integers nearest(const py::tuple& fields) {
  const spu::host::Problem problem = read_problem(fields);
  py::gil_scoped_release release;
  return spu::host::nearest(problem);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "C++ cores of spu.schedules and spu.plan: the simulator and the search.";
  m.def("simulate", &simulate, py::arg("first"), py::arg("stages"), py::arg("kinds"), py::arg("microbatches"),
        py::arg("seconds"), py::arg("transfers"),
        "(starts, ends) in seconds of every action of a flat schedule, NaN for those that can never start; the same "
        "bits as spu.schedules.simulate.run_flat. Raises ValueError for arrays that do not fit together.");
  m.def("place", &place, py::arg("problem"), py::arg("slacks"),
        "The cuts that spu.plan.core.place_python finds for a spu.plan.core.Problem. Raises ValueError for arrays that "
        "do not fit together.");
  m.def("nearest", &nearest, py::arg("problem"), "The cuts that spu.plan.core.nearest_python finds.");
}
