// Threads that wait for a message help the others meanwhile: they take tasks of a product that another thread shares.
#pragma once

#include <stdint.h>

#include "cpu/kernels.h"

namespace spu::cpu {

// torch threads of those that wait in help_until now, and cores that other processes lend (cpu/borrow.h).
int64_t lent_threads();

// Runs body(context, begin, end) over pieces of [0, count) on the calling thread's torch threads. Which of them runs a
// piece, and how long it is, is left to chance.
void in_turns(const Shares& shares, RangeBody body, void* context);

// The same on these and on those that are lent. False, and nothing done, if nobody can help.
bool share(const Shares& shares, RangeBody body, void* context);

// Pieces that waiting threads have done so far.
int64_t helped();

// What a thread that waits for work goes by: all that it looks for changes the number.
uint32_t changes();
// Returns when it is not `seen` any more.
void sleep_until_change(uint32_t seen);
void announce_change();

void pause_briefly();

// Runs pieces of what is shared, one at a time, as long as more(context) says so; tells whether there were any.
bool help_while(bool (*more)(void*), void* context);

// How often ring() was called. One who finds his message missing helps until it is more.
uint32_t rings();
void ring();
void help_until(uint32_t more_than);

}  // namespace spu::cpu
