// A stage of a pipeline waits for a good part of each step, and its cores with it. Here its thread waits by helping: a
// product that is large enough puts its tasks on a desk, and whoever waits takes some. Results stay the same bit for
// bit, since a task is the same work whoever does it and no sum depends on how many there are.
#include "cpu/help.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <thread>

#include "cpu/borrow.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spu::cpu {
namespace {

struct Job {
  int64_t count, parts, least;
  RangeBody body;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  bool left() const { return next.load(std::memory_order_relaxed) < count; }

  // Takes [*begin, *end): two thirds of the caller's share of what is left (guided self-scheduling: Polychronopoulos
  // and Kuck, 1987), so that all end at about the same time, also on unlike cores and beside other programs; or `one`
  // piece, which ends soon.
  bool take(int64_t* begin, int64_t* end, bool one) {
    *begin = next.load(std::memory_order_relaxed);
    do {
      const int64_t left = (count - *begin + least - 1) / least;
      if (left <= 0) return false;
      const int64_t pieces = one ? 1 : (2 * left + 3 * parts - 1) / (3 * parts);
      *end = pieces < left ? *begin + pieces * least : count;
    } while (!next.compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
    return true;
  }

  // Tells whether something was left for the calling thread.
  bool work_once(bool one) {
    int64_t begin, end;
    if (!take(&begin, &end, one)) return false;
    try {
      body(context, begin, end);
    } catch (...) {  // for want of memory: the one who shared the job raises it
      if (!failed.exchange(true)) error = std::current_exception();
      next.store(count, std::memory_order_relaxed);
    }
    return true;
  }

  // Returns how many pieces were left for the calling thread.
  int64_t work() {
    int64_t done = 0;
    while (work_once(false)) ++done;
    return done;
  }

  int64_t work_on_own_threads() {
    const int64_t threads = cpu::threads();
    if (threads == 1) return work();
    std::atomic<int64_t> done{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { done.fetch_add(work()); });
    return done.load();
  }
};

// A job lives on its owner's stack. `inside` counts those who may hold a pointer to it; its owner leaves after them.
struct alignas(64) Desk {
  std::atomic<Job*> job{nullptr};
  std::atomic<int> inside{0};
};

constexpr int kDesks = 16;
Desk desks[kDesks];

// All that a waiting thread looks for changes `events`, which it sleeps on.
std::atomic<uint32_t> events{0}, bell{0};
std::atomic<int64_t> lent{0}, pieces_helped{0};
std::atomic<int> asleep{0};

// A step makes a product every millisecond or so: the next one is worth a short wait, a sleeper takes longer to wake.
constexpr int kSpins = 2000;

// Calls work(job), which returns how many pieces it has done, for each job that has some left.
template <class Work>
bool help(const Work& work) {
  int64_t helped = 0;
  for (Desk& desk : desks) {
    if (!desk.job.load(std::memory_order_relaxed)) continue;
    desk.inside.fetch_add(1);
    Job* job = desk.job.load();
    if (job && job->left()) helped += work(*job);
    desk.inside.fetch_sub(1);
  }
  if (helped) pieces_helped.fetch_add(helped);
  return helped > 0;
}

#if defined(__linux__)
// A forked process has none of the threads that were waiting or at work.
void forget_threads() {
  for (Desk& desk : desks) desk.job.store(nullptr), desk.inside.store(0);
  lent.store(0), asleep.store(0);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
#endif

}  // namespace

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

uint32_t changes() {
  return events.load();
}

void announce_change() {
  events.fetch_add(1);
#if defined(__linux__)
  if (asleep.load() > 0) syscall(SYS_futex, &events, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
}

void sleep_until_change(uint32_t seen) {
#if defined(__linux__)
  asleep.fetch_add(1);
  syscall(SYS_futex, &events, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  asleep.fetch_sub(1);
#endif
}

void wait_for_change(uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    if (events.load(std::memory_order_relaxed) != seen) return;
    pause_briefly();
  }
  sleep_until_change(seen);
}

bool help_while(bool (*more)(void*), void* context) {
  return help([&](Job& job) {
    int64_t done = 0;
    while (more(context) && job.work_once(true)) ++done;
    return done;
  });
}

int64_t lent_threads() {
  return lent.load(std::memory_order_relaxed) + borrowed_cores();
}

void in_turns(const Shares& shares, RangeBody body, void* context) {
  Job job = {shares.count, shares.parts, shares.least, body, context};
  job.work_on_own_threads();
  if (job.failed) std::rethrow_exception(job.error);
}

bool share(const Shares& shares, RangeBody body, void* context) {
  if (lent_threads() == 0) return false;
  Job job = {shares.count, shares.parts, shares.least, body, context};
  Desk* found = nullptr;
  for (Desk& desk : desks) {
    Job* none = nullptr;
    if (!desk.job.compare_exchange_strong(none, &job)) continue;
    found = &desk;
    break;
  }
  if (!found) return false;
  announce_change();
  job.work_on_own_threads();
  found->job.store(nullptr);
  for (int i = 0; found->inside.load() > 0; ++i) {
    if (i < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();  // the helper may have lost its core
    }
  }
  if (job.failed) std::rethrow_exception(job.error);
  return true;
}

int64_t helped() {
  return pieces_helped.load();
}

uint32_t rings() {
  return bell.load();
}

void ring() {
  bell.fetch_add(1);
  announce_change();
}

void help_until(uint32_t more_than) {
  const int64_t own = threads();
  lent.fetch_add(own);
  for (;;) {
    const uint32_t seen = changes();
    if (bell.load() != more_than) break;
    if (!help([](Job& job) { return job.work_on_own_threads(); })) wait_for_change(seen);
  }
  lent.fetch_sub(own);
}

}  // namespace spu::cpu
