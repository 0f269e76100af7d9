// The exact search over stage boundaries and recomputed layers.
#pragma once

#include <cstdint>
#include <vector>

namespace spu::host {

// Whether layers are recomputed in the backward: none, all, or as few as the budget asks for.
enum Recompute : std::int64_t { kNone = 0, kAll = 1, kAuto = 2 };

// Stages of consecutive layers under budgets, as arrays; field by field that of spu.plan.core.Problem.
struct Problem {
  std::int64_t layers;
  std::int64_t stages;
  std::int64_t recompute;
  std::vector<double> forward, backward;                                // [stages * layers] seconds
  std::vector<std::int64_t> fixed, own, inner, inner_recomputed;        // [layers] bytes
  std::vector<std::int64_t> extra, extra_recomputed;                    // [layers] bytes
  std::vector<std::int64_t> in_flight, budgets;                         // [stages]
  std::vector<std::int64_t> enter_fixed, enter_each, enter_recomputed;  // [stages * (layers + 1)] bytes
  std::vector<std::int64_t> leave_fixed, leave_each, leave_extra;       // [stages * (layers + 1)] bytes
  std::vector<double> enter_s, leave_s;                                 // [stages * (layers + 1)] seconds
};

using Cuts = std::vector<std::int64_t>;  // [stages + 1], from 0 to layers

// The partitions that spu.plan.core.place_python finds, by the same sums and maxima in the same order.
// Throws std::invalid_argument for arrays that do not fit together.
std::vector<Cuts> place(const Problem& problem, const std::vector<double>& slacks);

// The same for nearest_python.
Cuts nearest(const Problem& problem);

}  // namespace spu::host
