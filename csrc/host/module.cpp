// spu._host: the host-side searches and simulators that planning needs. Touches no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>
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

// A Problem from the spu.plan.core.Problem with fields of the same names.
spu::host::Problem read_problem(const py::object& from) {
  const auto read = [&from](const char* name, auto& into) {
    into = from.attr(name).cast<std::remove_reference_t<decltype(into)>>();
  };
  spu::host::Problem p;
  read("layers", p.layers);
  read("stages", p.stages);
  read("recompute", p.recompute);
  read("forward", p.forward);
  read("backward", p.backward);
  read("fixed", p.fixed);
  read("own", p.own);
  read("inner", p.inner);
  read("inner_recomputed", p.inner_recomputed);
  read("extra", p.extra);
  read("extra_recomputed", p.extra_recomputed);
  read("in_flight", p.in_flight);
  read("budgets", p.budgets);
  read("enter_fixed", p.enter_fixed);
  read("enter_each", p.enter_each);
  read("enter_recomputed", p.enter_recomputed);
  read("leave_fixed", p.leave_fixed);
  read("leave_each", p.leave_each);
  read("leave_extra", p.leave_extra);
  read("enter_s", p.enter_s);
  read("leave_s", p.leave_s);
  return p;
}

std::vector<Integers> best_cuts(const py::object& from, const Seconds& slacks) {
  const spu::host::Problem problem = read_problem(from);
  py::gil_scoped_release release;
  return spu::host::place(problem, slacks);
}

Integers nearest_cuts(const py::object& from) {
  const spu::host::Problem problem = read_problem(from);
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
  m.def("best_cuts", &best_cuts, py::arg("problem"), py::arg("slacks"),
        "The cuts that spu.plan.core.place_python finds for a spu.plan.core.Problem. Raises ValueError for arrays that "
        "do not fit together.");
  m.def("nearest_cuts", &nearest_cuts, py::arg("problem"), "The cuts that spu.plan.core.nearest_python finds.");
}
