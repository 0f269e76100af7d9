// The schedule simulator: when each action of a pipeline schedule runs, given how long each takes.
#pragma once

#include <cstdint>
#include <vector>

namespace spu::host {

// Index into spu.schedules.actions.KINDS.
enum Kind : std::int64_t { kForward = 0, kBackward = 1, kInputGradient = 2, kWeightGradient = 3 };

// A schedule as arrays; entry k is the k-th action, rank by rank. See FlatSchedule in schedules/simulate.py.
struct FlatSchedule {
  std::vector<std::int64_t> first;         // [ranks + 1] index of each rank's first action, then their number
  std::vector<std::int64_t> stages;        // [actions]
  std::vector<std::int64_t> kinds;         // [actions]
  std::vector<std::int64_t> microbatches;  // [actions]
  std::vector<double> seconds;             // [actions]
  std::vector<double> transfers;           // [stages - 1] seconds over each boundary, either direction
};

// Seconds at which each action starts and ends; NaN for an action that can never start.
struct Times {
  std::vector<double> starts;  // [actions]
  std::vector<double> ends;    // [actions]
};

// Every action starts as soon as its rank is free and its inputs have arrived: the same sums and maxima, in the same
// order, as run_flat in schedules/simulate.py, and so the same bits.
// Throws std::invalid_argument for arrays that do not fit together.
Times simulate(const FlatSchedule& schedule);

}  // namespace spu::host
