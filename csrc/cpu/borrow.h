// Cores that go from one process to another while their own waits: two stages of a pipeline on one machine, say.
#pragma once

#include <stdint.h>

#include <atomic>

namespace spu::cpu {

// Whose a core is now, in memory that the processes share.
using CoreWord = std::atomic<uint32_t>;

// The cores of these words are free for others until they are taken back. Both are for the process that has them.
void lend_cores(CoreWord* words, int64_t count);
// Returns when nobody is at work on them any more; at the latest after a moment, should a process have died there.
void take_cores_back(CoreWord* words, int64_t count);

// Starts a thread for a core of another process, bound to it, which takes part in this one's products while the core is
// lent. False, and nothing done, if there are too many already or none can be. Not for several threads at once.
bool borrow_core(CoreWord* word, int core);
void borrow_no_more();

// How many of them are lent and free now.
int64_t borrowed_cores();

}  // namespace spu::cpu
