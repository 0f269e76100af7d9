// A process that waits for another one's message lends its cores: each other process has a thread for each of them,
// which sleeps until the core is free and its own process has work to share (cpu/help.h). It takes one piece at a time
// and leaves when the core's owner wants it back; the owner waits for the end of that piece, since a thread that were
// left without its core in the middle of one would hold up its own process. Nothing but the use of a core depends on
// the words: whatever a process writes there before it dies, no result is another one.
#include "cpu/borrow.h"

#include <thread>

#include "cpu/help.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace spu::cpu {

#if defined(__linux__)

namespace {

enum State : uint32_t { kOwn = 0, kLent = 1, kTaken = 2, kWanted = 3 };

constexpr int64_t kMost = 64;           // threads of a process on others' cores: each is woken for each product
constexpr int64_t kWaitNs = 5'000'000;  // for a piece's end; it takes a tenth of a millisecond
constexpr int kTries = 200, kAwake = 100000;

CoreWord* words[kMost];
std::atomic<int64_t> borrowed{0};
std::atomic<bool> over{false};
std::thread* threads_there[kMost];  // on the heap: a process may end with them asleep

bool change(CoreWord* word, uint32_t from, State to) {
  return word->compare_exchange_strong(from, to);
}

bool is_taken(void* word) {
  return static_cast<CoreWord*>(word)->load(std::memory_order_relaxed) == kTaken;
}

void give_up(CoreWord* word) {
  if (change(word, kTaken, kLent) || !change(word, kWanted, kOwn)) return;
  syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

// Waits for a change: awake while the core is free, since waking takes as long as a small product.
void stay(CoreWord* word, uint32_t seen) {
  for (int i = 1; word->load(std::memory_order_relaxed) == kLent; ++i) {
    if (changes() != seen) return;
    pause_briefly();
    if (i % kTries == 0) sched_yield();  // its owner may be back
    if (i == kAwake) break;
  }
  sleep_until_change(seen);
}

void work_there(CoreWord* word, int core) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(core, &only);
  sched_setaffinity(0, sizeof only, &only);  // where it is refused, the thread runs where the process may
  while (!over.load()) {
    const uint32_t seen = changes();
    if (over.load()) break;
    bool found = false;
    if (change(word, kLent, kTaken)) {
      found = help_while(is_taken, word);
      give_up(word);
    }
    if (!found) stay(word, seen);
  }
}

void forget() {  // a forked process has none of the threads
  borrowed.store(0);
}

[[maybe_unused]] const int forgetting = pthread_atfork(nullptr, nullptr, forget);

void take_back(CoreWord* word) {
  for (int i = 0; i < kTries; ++i) {
    if (change(word, kLent, kOwn) || word->load() == kOwn) return;
    change(word, kTaken, kWanted);
    pause_briefly();
  }
  const timespec most = {0, kWaitNs};
  syscall(SYS_futex, word, FUTEX_WAIT, kWanted, &most, nullptr, 0);
  word->store(kOwn);
}

}  // namespace

void lend_cores(CoreWord* own, int64_t count) {
  for (int64_t i = 0; i < count; ++i) change(own + i, kOwn, kLent);
}

void take_cores_back(CoreWord* own, int64_t count) {
  for (int64_t i = 0; i < count; ++i) take_back(own + i);
}

bool borrow_core(CoreWord* word, int core) {
  const int64_t count = borrowed.load();
  if (count == kMost) return false;
  over.store(false);
  words[count] = word;
  threads_there[count] = new std::thread(work_there, word, core);
  borrowed.store(count + 1);
  return true;
}

void borrow_no_more() {
  const int64_t count = borrowed.exchange(0);
  over.store(true);
  announce_change();
  for (int64_t i = 0; i < count; ++i) {
    threads_there[i]->join();
    delete threads_there[i];
  }
}

int64_t borrowed_cores() {
  int64_t free = 0;
  const int64_t count = borrowed.load(std::memory_order_relaxed);
  for (int64_t i = 0; i < count; ++i) free += words[i]->load(std::memory_order_relaxed) == kLent;
  return free;
}

#else

void lend_cores(CoreWord*, int64_t) {}

void take_cores_back(CoreWord*, int64_t) {}

bool borrow_core(CoreWord*, int) {
  return false;
}

void borrow_no_more() {}

int64_t borrowed_cores() {
  return 0;
}

#endif

}  // namespace spu::cpu
