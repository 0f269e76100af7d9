#include "place.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace spu::host {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The tables have layers^2 * stages entries: a wild number must not become a wild allocation.
constexpr std::int64_t kMostLayers = 4096;
constexpr std::int64_t kMostStages = 4096;

template <class Values>
void require_size(const Values& values, std::int64_t count, const char* name) {
  if (static_cast<std::int64_t>(values.size()) != count) {
    throw std::invalid_argument("place: " + std::string(name) + " must have " + std::to_string(count) +
                                " values, got " + std::to_string(values.size()));
  }
}

void check(const Problem& p) {
  if (p.stages < 1 || p.layers < p.stages || p.layers > kMostLayers || p.stages > kMostStages) {
    throw std::invalid_argument("place: " + std::to_string(p.stages) + " stages of " + std::to_string(p.layers) +
                                " layers: there must be a layer for each stage, and 4096 at most");
  }
  const std::int64_t pairs = p.stages * p.layers, ends = p.stages * (p.layers + 1);
  require_size(p.forward, pairs, "forward");
  require_size(p.backward, pairs, "backward");
  require_size(p.fixed, p.layers, "fixed");
  require_size(p.own, p.layers, "own");
  require_size(p.inner, p.layers, "inner");
  require_size(p.inner_recomputed, p.layers, "inner_recomputed");
  require_size(p.extra, p.layers, "extra");
  require_size(p.extra_recomputed, p.layers, "extra_recomputed");
  require_size(p.in_flight, p.stages, "in_flight");
  require_size(p.budgets, p.stages, "budgets");
  require_size(p.enter_fixed, ends, "enter_fixed");
  require_size(p.enter_each, ends, "enter_each");
  require_size(p.enter_recomputed, ends, "enter_recomputed");
  require_size(p.leave_fixed, ends, "leave_fixed");
  require_size(p.leave_each, ends, "leave_each");
  require_size(p.leave_extra, ends, "leave_extra");
  require_size(p.enter_s, ends, "enter_s");
  require_size(p.leave_s, ends, "leave_s");
}

template <class T>
std::vector<T> running(const std::vector<T>& values) {
  std::vector<T> sums(values.size() + 1, T{0});
  for (std::size_t k = 0; k < values.size(); ++k) sums[k + 1] = sums[k] + values[k];
  return sums;
}

struct Weight {
  double seconds;
  std::int64_t needed;
};

// Weighs every run of layers on one stage.
class StageCosts {
 public:
  StageCosts(const Problem& p, std::int64_t stage)
      : p_(p),
        stage_(stage),
        fixed_(running(p.fixed)),
        own_(running(p.own)),
        inner_(running(p.inner)),
        order_(order()) {
    seconds_.assign(static_cast<std::size_t>(p.layers) + 1, 0.0);
    for (std::int64_t k = 0; k < p.layers; ++k) {
      seconds_[k + 1] = seconds_[k] + (p.forward[stage * p.layers + k] + p.backward[stage * p.layers + k]);
    }
  }

  Weight weigh(std::int64_t first, std::int64_t last) const {
    const std::int64_t enter = stage_ * (p_.layers + 1) + first, leave = stage_ * (p_.layers + 1) + last;
    double seconds = seconds_[last] - seconds_[first] + p_.enter_s[enter] + p_.leave_s[leave];
    const std::int64_t fixed = fixed_[last] - fixed_[first] + p_.enter_fixed[enter] + p_.leave_fixed[leave];
    std::int64_t each = own_[last] - own_[first] + inner_[last] - inner_[first + 1];
    each += p_.enter_each[enter] + p_.leave_each[leave];
    std::int64_t extra = p_.leave_extra[leave];
    for (std::int64_t k = first; k < last; ++k) extra = std::max(extra, p_.extra[k]);
    const std::int64_t flying = p_.in_flight[stage_], budget = p_.budgets[stage_];
    std::int64_t needed = fixed + flying * each + extra;
    if (p_.recompute == kNone || (p_.recompute == kAuto && needed <= budget)) return {seconds, needed};
    for (const std::int64_t k : order_) {
      if (k < first || k >= last) continue;
      const std::int64_t saved = p_.own[k] + (k == first ? p_.enter_each[enter] - p_.enter_recomputed[enter]
                                                         : p_.inner[k] - p_.inner_recomputed[k]);
      if (p_.recompute == kAuto && saved <= 0) continue;
      each -= saved;
      extra = std::max(extra, p_.extra_recomputed[k]);
      seconds += p_.forward[stage_ * p_.layers + k];
      needed = fixed + flying * each + extra;
      if (p_.recompute == kAuto && needed <= budget) break;
    }
    return {seconds, needed};
  }

 private:
  std::vector<std::int64_t> order() const {
    std::vector<double> worth(static_cast<std::size_t>(p_.layers));
    std::vector<std::int64_t> order(worth.size());
    for (std::int64_t k = 0; k < p_.layers; ++k) {
      const double saved = static_cast<double>(p_.own[k] + p_.inner[k] - p_.inner_recomputed[k]);
      const double seconds = p_.forward[stage_ * p_.layers + k];
      worth[k] = seconds > 0.0 ? saved / seconds : (saved > 0.0 ? kInfinity : 0.0);
      order[k] = k;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&worth](std::int64_t a, std::int64_t b) { return worth[a] > worth[b]; });
    return order;
  }

  const Problem& p_;
  std::int64_t stage_;
  std::vector<double> seconds_;
  std::vector<std::int64_t> fixed_, own_, inner_, order_;
};

using Table = std::vector<std::vector<double>>;  // [stages][first * (layers + 1) + last]

template <class Value>
Table make_table(const Problem& p, Value value) {
  Table table;
  for (std::int64_t stage = 0; stage < p.stages; ++stage) {
    const StageCosts scale(p, stage);
    std::vector<double> row(static_cast<std::size_t>((p.layers + 1) * (p.layers + 1)), kInfinity);
    const std::int64_t spare = p.layers - p.stages + stage;
    for (std::int64_t first = stage; first <= (stage ? spare : 0); ++first) {
      const std::int64_t begin = stage < p.stages - 1 ? first + 1 : p.layers;
      for (std::int64_t last = begin; last <= spare + 1; ++last) {
        row[first * (p.layers + 1) + last] = value(scale.weigh(first, last), stage);
      }
    }
    table.push_back(std::move(row));
  }
  return table;
}

// best[s][j] = min over i of join(best[s - 1][i], table[s][i, j]), and the cuts that reach it.
template <class Join>
std::pair<double, Cuts> solve(const Problem& p, const Table& table, Join join) {
  const std::int64_t width = p.layers + 1;
  std::vector<double> best(static_cast<std::size_t>(p.stages * width), kInfinity);
  std::vector<std::int64_t> cut(best.size(), 0);
  for (std::int64_t last = 1; last <= p.layers; ++last) best[last] = table[0][last];
  for (std::int64_t stage = 1; stage < p.stages; ++stage) {
    for (std::int64_t last = stage + 1; last <= p.layers; ++last) {
      double& found = best[stage * width + last];
      cut[stage * width + last] = stage;
      for (std::int64_t first = stage; first < last; ++first) {
        const double before = best[(stage - 1) * width + first];
        if (!(before < found)) continue;
        const double value = join(before, table[stage][first * width + last]);
        if (value < found) {
          found = value;
          cut[stage * width + last] = first;
        }
      }
    }
  }
  Cuts cuts(static_cast<std::size_t>(p.stages) + 1, 0);
  cuts[p.stages] = p.layers;
  for (std::int64_t stage = p.stages - 1; stage > 0; --stage) cuts[stage] = cut[stage * width + cuts[stage + 1]];
  return {best[(p.stages - 1) * width + p.layers], std::move(cuts)};
}

double larger(double a, double b) {
  return b > a ? b : a;
}

double sum(double a, double b) {
  return a + b;
}

// The table with every entry above a limit taken out, and the others changed.
template <class Change>
Table limited(const Table& table, double limit, Change change) {
  Table result = table;
  for (auto& row : result) {
    for (double& v : row) v = v <= limit ? change(v) : kInfinity;
  }
  return result;
}

}  // namespace

std::vector<Cuts> place(const Problem& problem, const std::vector<double>& slacks) {
  check(problem);
  const Table table = make_table(problem, [&problem](const Weight& weight, std::int64_t stage) {
    return weight.needed <= problem.budgets[stage] ? weight.seconds : kInfinity;
  });
  const auto [slowest, cuts] = solve(problem, table, larger);
  if (slowest == kInfinity) return {};
  auto [squares, even] = solve(problem, limited(table, slowest, [](double v) { return v * v; }), sum);
  std::vector<Cuts> results{squares == kInfinity ? cuts : even};
  for (const double slack : slacks) {
    auto [total, found] = solve(problem, limited(table, slowest * slack, [](double v) { return v; }), sum);
    if (total != kInfinity && std::find(results.begin(), results.end(), found) == results.end()) {
      results.push_back(std::move(found));
    }
  }
  return results;
}

Cuts nearest(const Problem& problem) {
  check(problem);
  const Table table = make_table(problem, [&problem](const Weight& weight, std::int64_t stage) {
    return static_cast<double>(weight.needed - problem.budgets[stage]);
  });
  return solve(problem, table, larger).second;
}

}  // namespace spu::host
