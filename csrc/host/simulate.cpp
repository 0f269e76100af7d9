#include "simulate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace spu::host {
namespace {

// The tables are dense in stages and microbatches: a wild number must not become a wild allocation.
constexpr std::int64_t kMostCells = std::int64_t{1} << 24;

constexpr double kNever = std::numeric_limits<double>::quiet_NaN();

// The later of two times; NaN, which stands for never, wins. (std::max would lose it.)
double later(double a, double b) {
  return std::isnan(b) || b > a ? b : a;
}

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("simulate: " + message);
}

// Messages are made for a failed check alone: schedules have many actions, and a search simulates many schedules.
void check_actions(const FlatSchedule& s, std::int64_t stages) {
  const auto named = [](const char* name, std::size_t k, std::int64_t value) {
    return std::string(name) + "[" + std::to_string(k) + "] is " + std::to_string(value);
  };
  for (std::size_t k = 0; k < s.kinds.size(); ++k) {
    if (s.stages[k] < 0 || s.stages[k] >= stages) {
      refuse(named("stages", k, s.stages[k]) + ", not 0 to " + std::to_string(stages - 1) +
             ", the number of transfers");
    }
    if (s.kinds[k] < kForward || s.kinds[k] > kWeightGradient) refuse(named("kinds", k, s.kinds[k]) + ", not 0 to 3");
    if (s.microbatches[k] < 0 || s.microbatches[k] >= kMostCells / stages) {
      refuse(named("microbatches", k, s.microbatches[k]) + ", not 0 to " + std::to_string(kMostCells / stages - 1) +
             ", the most for " + std::to_string(stages) + " stages");
    }
  }
}

void check(const FlatSchedule& s) {
  const std::size_t actions = s.kinds.size();
  if (s.first.empty()) refuse("first must hold at least one index");
  if (s.stages.size() != actions || s.microbatches.size() != actions || s.seconds.size() != actions) {
    refuse("kinds, stages, microbatches and seconds must be equally long, got " + std::to_string(actions) + ", " +
           std::to_string(s.stages.size()) + ", " + std::to_string(s.microbatches.size()) + " and " +
           std::to_string(s.seconds.size()));
  }
  if (s.first.front() != 0 || s.first.back() != static_cast<std::int64_t>(actions) ||
      !std::is_sorted(s.first.begin(), s.first.end())) {
    refuse("first must ascend from 0 to the number of actions");
  }
  check_actions(s, static_cast<std::int64_t>(s.transfers.size()) + 1);
}

class Simulator {
 public:
  explicit Simulator(const FlatSchedule& schedule)
      : s_(schedule),
        ranks_(static_cast<std::int64_t>(schedule.first.size()) - 1),
        last_(static_cast<std::int64_t>(schedule.transfers.size())) {
    for (const std::int64_t microbatch : s_.microbatches) columns_ = std::max(columns_, microbatch + 1);
    forward_.assign(static_cast<std::size_t>((last_ + 1) * columns_), kNever);
    gradient_ = forward_;
    sent_forward_ = forward_;
    sent_gradient_ = forward_;
    forward_link_.assign(static_cast<std::size_t>(last_ + 1), 0.0);
    backward_link_ = forward_link_;
    times_.starts.assign(s_.kinds.size(), kNever);
    times_.ends = times_.starts;
    head_.assign(s_.first.begin(), s_.first.end() - 1);
    clock_.assign(static_cast<std::size_t>(ranks_), 0.0);
  }

  Times run() {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::int64_t rank = 0; rank < ranks_; ++rank) {
        while (head_[rank] < s_.first[rank + 1] && start(rank)) moved = true;
      }
    }
    return std::move(times_);
  }

 private:
  // Runs the rank's next action; false if its inputs have not been made yet.
  bool start(std::int64_t rank) {
    const std::int64_t k = head_[rank];
    const std::int64_t stage = s_.stages[k];
    const std::int64_t cell = stage * columns_ + s_.microbatches[k];
    const std::int64_t kind = s_.kinds[k];
    const double ready = input_time(clock_[rank], stage, cell, kind);
    if (std::isnan(ready)) return false;
    const double end = ready + s_.seconds[k];
    times_.starts[k] = ready;
    times_.ends[k] = clock_[rank] = end;
    if (kind == kForward) {
      forward_[cell] = end;
      if (stage < last_) sent_forward_[cell] = send(forward_link_[stage], end, s_.transfers[stage]);
    } else if (kind != kWeightGradient) {
      gradient_[cell] = end;
      if (stage > 0) sent_gradient_[cell] = send(backward_link_[stage], end, s_.transfers[stage - 1]);
    }
    ++head_[rank];
    return true;
  }

  // When a transfer of these seconds arrives that is ready at `end`, over a link that carries one at a time.
  static double send(double& link, double end, double seconds) {
    link = later(end, link) + seconds;
    return link;
  }

  double input_time(double ready, std::int64_t stage, std::int64_t cell, std::int64_t kind) const {
    if (kind == kForward) {
      return stage == 0 ? ready : later(ready, sent_forward_[cell - columns_]);
    }
    if (kind == kWeightGradient) return later(ready, gradient_[cell]);
    const double own = later(ready, forward_[cell]);
    if (std::isnan(own) || stage == last_) return own;
    return later(own, sent_gradient_[cell + columns_]);
  }

  const FlatSchedule& s_;
  std::int64_t ranks_;
  std::int64_t last_;                  // the last stage
  std::int64_t columns_ = 0;           // microbatches
  std::vector<double> forward_;        // [stages, microbatches] when the forward ended
  std::vector<double> gradient_;       // [stages, microbatches] when the gradient of the stage's input was there
  std::vector<double> sent_forward_;   // [stages, microbatches] when the output had arrived at the next stage
  std::vector<double> sent_gradient_;  // [stages, microbatches] when the gradient had arrived at the one before
  std::vector<double> forward_link_;   // [stages] when the link to the next stage is free
  std::vector<double> backward_link_;  // [stages] when the link to the one before is free
  std::vector<std::int64_t> head_;
  std::vector<double> clock_;
  Times times_;
};

}  // namespace

Times simulate(const FlatSchedule& schedule) {
  check(schedule);
  return Simulator(schedule).run();
}

}  // namespace spu::host
